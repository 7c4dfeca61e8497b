"""Checkpoints survive kills, full disks, broken files and malice."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from sandbox.contracts import Diverged, StorageError
from sandbox.storage import checkpoint
from tests.bad_files import largest_file, names, plain_pickle, torch_legacy, torch_zip

FORK = multiprocessing.get_context("fork")  # shares the imports: a spawned process needs seconds


def state(step: int = 1, numbers: int = 100) -> dict:
    made = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "weights": {"a.b": torch.randn(numbers, generator=made), "half": torch.ones(3).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.0)}},
            "groups": [{"betas": (0.9, 0.95)}],
        },
        "loader": OrderedDict(epoch=1, done=None, name="x", ok=True),
    }


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- writing --------------------------------------------------------------------------------------


def test_what_is_loaded_equals_what_was_saved(tmp_path):
    saved = state()
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, 1))
    assert loaded["loader"] == saved["loader"]
    assert loaded["optimizer"] == saved["optimizer"]
    for name, tensor in saved["weights"].items():
        assert loaded["weights"][name].dtype == tensor.dtype
        assert torch.equal(loaded["weights"][name], tensor)


def test_manifest_says_step_size_hash_and_notes(tmp_path):
    path = checkpoint.save(tmp_path, state(), 12, notes={"vae": "abc"})
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert (recorded["step"], recorded["format"], recorded["notes"]) == (12, 1, {"vae": "abc"})
    assert recorded["size"] == path.stat().st_size
    assert recorded["sha256"] == checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_step_saved_again_writes_over_nothing(tmp_path):
    first = checkpoint.save(tmp_path, state(1), 3)
    before = first.read_bytes()
    second = checkpoint.save(tmp_path, state(2), 3)
    assert first.read_bytes() == before
    assert checkpoint.newest(tmp_path) == second


def test_newest_is_the_highest_step_whatever_was_written_last(tmp_path):
    high = checkpoint.save(tmp_path, state(), 100_000_000)
    checkpoint.save(tmp_path, state(), 99)
    assert checkpoint.newest(tmp_path) == high


@pytest.mark.parametrize("folder", ["missing", "."])
def test_folder_without_checkpoints_has_no_newest(tmp_path, folder):
    assert checkpoint.newest(tmp_path / folder) is None


# --- killed ---------------------------------------------------------------------------------------


def save_until_killed(folder: Path, first: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    for step in range(first, first + 1000):
        checkpoint.save(folder, state(step, 500_000), step)


def save_and_be_killed_in_a_write(folder: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends the process in the middle of write()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoint.save(folder, state(2, 500_000), 2)


def test_kill_at_random_moments_leaves_a_good_checkpoint(tmp_path):
    checkpoint.save(tmp_path, state(0, 500_000), 0)
    reached = 0
    for kill in range(6):
        child = FORK.Process(target=save_until_killed, args=(tmp_path, reached + 1))
        child.start()
        time.sleep(0.05 + 0.013 * kill)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        loaded = checkpoint.load(checkpoint.newest(tmp_path))
        assert loaded["step"] >= reached
        expected = state(loaded["step"], 500_000)["weights"]["a.b"]
        assert torch.equal(loaded["weights"]["a.b"], expected)
        reached = loaded["step"]


def test_kill_inside_a_write_leaves_the_old_one_and_the_next_save_tidies_up(tmp_path):
    old = checkpoint.save(tmp_path, state(), 1)
    child = FORK.Process(target=save_and_be_killed_in_a_write, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGXFSZ
    assert ".step_00000002.ckpt.part" in names(tmp_path)
    assert checkpoint.newest(tmp_path) == old
    checkpoint.save(tmp_path, state(), 2)
    assert not [n for n in names(tmp_path) if n.endswith(".part")]


# --- full disk ------------------------------------------------------------------------------------


def test_full_disk_is_a_storage_error_and_touches_nothing(tmp_path):
    checkpoint.save(tmp_path, state(), 1)
    before = names(tmp_path)
    with largest_file(50_000), pytest.raises(StorageError, match=r"step 2.*too large.*intact"):
        checkpoint.save(tmp_path, state(2, 500_000), 2, wait=0)
    assert names(tmp_path) == before
    assert StorageError.exit_code == 5


def test_manifest_that_cannot_be_written_leaves_no_file(tmp_path):
    notes = {"note": "n" * 60_000}
    with largest_file(50_000), pytest.raises(StorageError, match="too large"):
        checkpoint.save(tmp_path, state(), 1, notes=notes, attempts=1)
    assert names(tmp_path) == []
    checkpoint.save(tmp_path, state(), 1, notes=notes)
    assert names(tmp_path) == ["step_00000001.ckpt", "step_00000001.json"]


def test_write_is_tried_again_until_there_is_space(tmp_path, caplog):
    with largest_file(50_000):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        freed = threading.Timer(0.2, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))
        freed.start()
        path = checkpoint.save(tmp_path, state(2, 500_000), 2, attempts=200, wait=0.02)
        freed.join()
    assert checkpoint.load(path)["step"] == 2
    assert "trying again" in caplog.text


def test_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        checkpoint.save(tmp_path / "file" / "checkpoints", state(), 1, wait=0)


# --- broken ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def lose_manifest(path: Path) -> None:
    path.with_suffix(".json").unlink()


def lose_file(path: Path) -> None:
    path.unlink()


def garble_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text('{"format": 1, ')


def empty_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text("[]")


BREAKS = [flip_a_byte, truncate, grow, lose_manifest, lose_file, garble_manifest, empty_manifest]


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage):
    good = checkpoint.save(tmp_path, state(1), 1)
    broken = checkpoint.save(tmp_path, state(2), 2)
    damage(broken)
    assert checkpoint.newest(tmp_path) == good
    assert "skipped checkpoint" in caplog.text and broken.stem in caplog.text


@pytest.mark.parametrize("damage", BREAKS)
def test_the_state_of_the_newest_good_one_is_loaded(tmp_path, caplog, damage):
    checkpoint.save(tmp_path, state(1), 1)
    damage(checkpoint.save(tmp_path, state(2), 2))
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found["step"] == 1
    assert "skipped checkpoint" in caplog.text
    assert checkpoint.load_newest(tmp_path / "empty") is None


def test_the_newest_is_loaded_where_a_run_prunes_what_was_seen(tmp_path, monkeypatch):
    """A run that keeps one saves the next and deletes the first, between a look and the reading."""
    checkpoint.save(tmp_path, state(1), 1)
    opened = Path.open

    def late(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == "step_00000001.ckpt":
            monkeypatch.undo()
            checkpoint.save(tmp_path, state(2), 2)
            checkpoint.prune(tmp_path, keep=1)
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", late)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found["step"] == 2


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_checkpoint_is_not_loaded(tmp_path, damage):
    path = checkpoint.save(tmp_path, state(), 1)
    damage(path)
    with pytest.raises(StorageError, match=path.stem):
        checkpoint.load(path)


def test_newer_format_is_refused_and_not_passed_over(tmp_path):
    checkpoint.save(tmp_path, state(), 1)
    path = checkpoint.save(tmp_path, state(), 2)
    path.with_suffix(".json").write_text(json.dumps({"format": 2, "other": "keys"}))
    with pytest.raises(StorageError, match="format 2"):
        checkpoint.newest(tmp_path)


# --- what is not saved ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_that_are_not_finite_are_never_saved(tmp_path, value, dtype):
    bad = state()
    bad["weights"]["worse"] = torch.tensor([1.0, value]).to(dtype)
    with pytest.raises(Diverged, match=r"weights\.worse"):
        checkpoint.save(tmp_path, bad, 1)
    assert names(tmp_path) == []


def test_large_numbers_are_finite(tmp_path):
    large = torch.full((8,), 3e38)  # their sum is not
    assert torch.equal(checkpoint.load(checkpoint.save(tmp_path, {"w": large}, 1))["w"], large)


@pytest.mark.parametrize("thing", [Path("x"), {1, 2}, torch.float32, checkpoint.hashlib.sha256])
def test_what_a_restricted_load_would_refuse_is_named_by_its_path(tmp_path, thing):
    with pytest.raises(TypeError, match=r"state\.loader\.thing"):
        checkpoint.save(tmp_path, {"loader": {"thing": thing}}, 1)


# --- pruning --------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return sorted(checkpoint.manifest(p)["step"] for p in checkpoint.checkpoints(folder))


def test_prune_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, state(), step)
    checkpoint.prune(tmp_path, keep=2, milestones=3)
    assert steps(tmp_path) == [3, 6, 7]
    assert len(names(tmp_path)) == 6


def test_prune_keeps_the_best_besides_the_newest(tmp_path):
    """A number that is absent or not finite is never the best."""
    for step, value in enumerate([0.5, 0.2, float("nan"), 0.3, 0.4, None, 0.9], 1):
        notes = {} if value is None else {"val/loss": value}
        checkpoint.save(tmp_path, state(), step, notes=notes)
    checkpoint.prune(tmp_path, keep=1, best=2, best_of="val/loss")
    assert steps(tmp_path) == [2, 4, 7]


def test_a_torn_checkpoint_is_not_among_the_best(tmp_path):
    for step, value in enumerate([0.2, 0.1, 0.3, 0.4], 1):
        path = checkpoint.save(tmp_path, state(), step, notes={"val/loss": value})
        if step == 2:
            truncate(path)
    checkpoint.prune(tmp_path, keep=1, best=1, best_of="val/loss")
    assert steps(tmp_path) == [1, 4]


def test_the_best_do_not_replace_the_last_good_one(tmp_path):
    """Better numbers of broken files delete nothing."""
    good = checkpoint.save(tmp_path, state(), 1, notes={"val/loss": 9.0})
    for step in (2, 3):
        flip_a_byte(checkpoint.save(tmp_path, state(), step, notes={"val/loss": 0.1}))
    checkpoint.prune(tmp_path, keep=1, best=1, best_of="val/loss")
    assert checkpoint.newest(tmp_path) == good


def test_prune_never_deletes_the_last_good_one(tmp_path):
    good = checkpoint.save(tmp_path, state(), 1)
    for step in (2, 3):
        flip_a_byte(checkpoint.save(tmp_path, state(), step))
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.newest(tmp_path) == good


def test_prune_removes_broken_ones_that_are_older_than_a_good_one(tmp_path):
    truncate(checkpoint.save(tmp_path, state(), 1))
    checkpoint.save(tmp_path, state(), 2)
    checkpoint.prune(tmp_path, keep=5)
    assert names(tmp_path) == ["step_00000002.ckpt", "step_00000002.json"]


def test_prune_leaves_foreign_files_alone(tmp_path):
    (tmp_path / "step_notes.txt").write_text("mine")
    checkpoint.save(tmp_path, state(), 1)
    checkpoint.prune(tmp_path, keep=1)
    assert "step_notes.txt" in names(tmp_path)


# --- malice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [plain_pickle, torch_zip, torch_legacy])
def test_payload_under_a_matching_manifest_is_not_run(tmp_path, write):
    path, marker = checkpoint.save(tmp_path, state(), 1), tmp_path / "owned"
    write(path, marker)
    recorded = json.loads(path.with_suffix(".json").read_text())
    recorded["size"] = path.stat().st_size
    recorded["sha256"] = checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(recorded))
    with pytest.raises(StorageError, match="none of it was run"):
        checkpoint.load(path)
    assert not marker.exists()


# --- a policy -------------------------------------------------------------------------------------


def test_policy_saves_and_prunes(tmp_path, caplog):
    from plugins.checkpoint.keep import Keep

    caplog.set_level(logging.WARNING)
    for step in range(1, 5):
        checkpoint.save_and_prune(tmp_path, state(), step, Keep.Config(keep=2))
    assert steps(tmp_path) == [3, 4]
