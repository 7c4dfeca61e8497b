"""First stages get their weights from a file or from the cache, which makes them once."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sandbox.config import registry
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import reconstruct
from sandbox.model.components import build
from sandbox.storage import weight_files
from sandbox.storage.first_stage_files import FIRST_STAGE_FILE, cache_path, load_weights
from sandbox.tasks.train import train
from sandbox.training.build import build_system, check_weights, load_system
from sandbox.training.first_stage import calibrate, prepare_first_stage
from tests.bad_files import DAMAGES, cut_in_half, flip_a_byte, snapshot
from tests.training_sessions import differing, session, small, train_until

AUTO = ("vae.weights=auto", "vae.fit_clips=32", "data.clips_per_epoch=32")


def root_in(tmp_path, *overrides):
    root = small(*AUTO, *overrides)
    return replace(root, cache=str(tmp_path / "cache"), out=str(tmp_path / "out"))


def prepared(root, folder=None):
    first_stage = build("vae", root)
    prepare_first_stage(root, first_stage, folder)
    return first_stage.state_dict()


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.safetensors"))


def test_a_first_stage_is_made_once_and_then_read(tmp_path, capsys):
    root = root_in(tmp_path)
    first = prepared(root)
    assert "Fitting first stage vae/pca (cached in" in capsys.readouterr().out
    written = files(tmp_path)[0].stat().st_mtime_ns
    assert not differing(first, prepared(root))
    assert capsys.readouterr().out == ""
    assert [p.stat().st_mtime_ns for p in files(tmp_path)] == [written]
    fresh = registry.create(root.vae).state_dict()
    assert differing(first, fresh)


@pytest.mark.parametrize(
    "override",
    ["vae.components=16", "vae.fit_clips=16", "seed=1", "data.speed=2", "vae.components=8"],
)
def test_another_setting_seed_or_data_is_another_first_stage(tmp_path, override):
    more = ["data.height=24", "data.width=24"] if "speed" in override else []
    assert cache_path(root_in(tmp_path, override, *more)) != cache_path(root_in(tmp_path, *more))


@pytest.mark.parametrize(
    "override", ["lr=0.1", "optimizer=muon", "ema=none", "data.num_workers=2", "steps=7",
                 "data.batch_size=4", "trainer.accumulate=2"]
)  # fmt: skip
def test_what_a_sweep_varies_shares_one_first_stage(tmp_path, override):
    assert cache_path(root_in(tmp_path, override)) == cache_path(root_in(tmp_path))


@pytest.mark.parametrize(
    ("text", "is_other"), [("\nANOTHER = 1\n", True), ("\n# a comment\n", False)]
)
def test_other_code_is_another_first_stage_but_comments_are_not(
    tmp_path, monkeypatch, text, is_other
):
    root = root_in(tmp_path)
    before = cache_path(root)
    changed = tmp_path / "pca.py"
    plugin = registry.find("vae/pca")
    source = plugin.path.read_text().replace('"""', '"""Edited. ', 1)
    changed.write_text(source + text)
    monkeypatch.setitem(registry._plugins, "vae/pca", replace(plugin, path=changed))
    assert (cache_path(root) != before) is is_other


def test_code_shared_by_plugins_is_part_of_the_name(tmp_path, monkeypatch):
    root = root_in(tmp_path)
    before = cache_path(root)
    (tmp_path / "_blocks").mkdir()
    (tmp_path / "_blocks" / "posterior.py").write_text("ANOTHER = 1\n")
    monkeypatch.setattr("sandbox.storage.first_stage_files.PLUGINS", tmp_path)
    assert cache_path(root) != before


def test_two_that_start_together_make_it_once(tmp_path, capsys):
    """Threads, as the lock is one of files: it keeps them apart like processes."""
    root = root_in(tmp_path)
    found, ready = [], threading.Barrier(3)

    def one():
        first_stage = build("vae", root)
        ready.wait()
        prepare_first_stage(root, first_stage)
        found.append(first_stage.state_dict())

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert not differing(found[0], found[1]) and not differing(found[0], found[2])
    assert capsys.readouterr().out.count("Fitting first stage") == 1


def test_a_run_keeps_its_first_stage_when_the_cache_is_gone(tmp_path, capsys):
    root = root_in(tmp_path, "steps=4")
    state = train_until(2, root, tmp_path)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    capsys.readouterr()
    whole = train_until(None, root, tmp_path)
    assert "fitting" not in capsys.readouterr().out
    assert whole["frozen"] == state["frozen"]


def test_a_changed_first_stage_is_refused_by_resuming_and_sampling(tmp_path):
    root = root_in(tmp_path, "steps=4")
    train_until(2, root, tmp_path)
    (kept,) = tmp_path.glob(f"*/{FIRST_STAGE_FILE}")
    state = weight_files.read(kept)
    state["first.mean"] = state["first.mean"] + 1
    weight_files.write(state, kept)
    with pytest.raises(StorageError, match=r"first_stage: its weights .* are not those"):
        train_until(None, root, tmp_path)
    with pytest.raises(StorageError, match=r"first_stage: its weights .* are not those"):
        load_system(kept.parent)


def test_a_file_is_used_as_it_is(tmp_path):
    made = prepared(root_in(tmp_path))
    path = weight_files.write(made, tmp_path / "mine.safetensors")
    root = small(f"vae.weights={path}")
    assert not differing(made, prepared(root))


def test_a_file_of_another_size_is_refused(tmp_path):
    path = weight_files.write(prepared(root_in(tmp_path)), tmp_path / "mine.safetensors")
    with pytest.raises(StorageError, match=r"vae.weights=.*: 4 names or[^$]*first\.b"):
        prepared(small(f"vae.weights={path}", "vae.components=16"))


def test_a_file_of_another_size_is_refused_before_a_run_folder_is_made(tmp_path):
    path = weight_files.write(prepared(root_in(tmp_path)), tmp_path / "mine.safetensors")
    other = small(f"vae.weights={path}", "vae.components=16", f"out={tmp_path}/out")
    with pytest.raises(StorageError, match=r"vae.weights=.*: 4 names or[^$]*first\.b"):
        train({"root": to_container(other), "group": None, "overrides": []}, Rank())
    assert not (tmp_path / "out").exists()
    check_weights(wire(small(f"vae.weights={path}")))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    weight_files.write({"encoder.weight": torch.zeros(2)}, path)
    with pytest.raises(StorageError, match="names or shapes differ from this configuration"):
        load_weights(registry.create(small().vae), path)
    path.write_bytes(b"not a file of weights")
    with pytest.raises(StorageError, match="not a readable safetensors file"):
        load_weights(registry.create(small().vae), path)
    with pytest.raises(StorageError, match="no such file"):
        load_weights(registry.create(small().vae), tmp_path / "absent.safetensors")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"cache=.*: cannot be written"):
        prepared(root_in(tmp_path))


def test_a_first_stage_without_weights_needs_no_cache(tmp_path):
    root = replace(small("vae=identity"), cache=str(tmp_path / "cache"))
    build_system(wire(root))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_first_stage_in_the_cache_is_made_again(tmp_path, damage, caplog, capsys):
    root = root_in(tmp_path)
    first = prepared(root)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    damage(path)
    assert not differing(first, prepared(root))
    assert f"skipped first stage: vae.weights={path}" in caplog.text
    assert path.read_bytes() == whole
    caplog.clear()
    assert not differing(first, prepared(root)) and not caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_cache_does_not_reach_the_runs_that_have_used_it(tmp_path, damage):
    root = root_in(tmp_path, "steps=4")
    state = train_until(2, root, tmp_path)
    (kept,), (cached,) = tmp_path.glob(f"*/{FIRST_STAGE_FILE}"), files(tmp_path)
    whole = kept.read_bytes()
    assert not kept.samefile(cached)
    damage(cached)
    assert kept.read_bytes() == whole
    assert train_until(None, root, tmp_path)["frozen"] == state["frozen"]


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
@pytest.mark.parametrize("in_cache", ["whole", "damaged", "lost"])
def test_a_damaged_first_stage_of_a_run_comes_from_the_cache(tmp_path, damage, in_cache, caplog):
    """Whatever the cache has: the same one is made again, and what was trained fits it."""
    root = root_in(tmp_path, "steps=4")
    state = train_until(2, root, tmp_path)
    (kept,), (cached,) = tmp_path.glob(f"*/{FIRST_STAGE_FILE}"), files(tmp_path)
    whole = kept.read_bytes()
    damage(kept)
    if in_cache != "whole":
        (cut_in_half if in_cache == "damaged" else Path.unlink)(cached)
    if damage is flip_a_byte:
        load_system(kept.parent)
    assert train_until(None, root, tmp_path)["frozen"] == state["frozen"]
    assert kept.read_bytes() == whole
    assert ("skipped first stage" in caplog.text) == (
        damage != Path.unlink or in_cache == "damaged"
    )


def test_another_first_stage_never_replaces_the_damaged_one_of_a_run(tmp_path):
    root = root_in(tmp_path, "steps=4")
    train_until(2, root, tmp_path)
    (kept,), (cached,) = tmp_path.glob(f"*/{FIRST_STAGE_FILE}"), files(tmp_path)
    state = weight_files.read(cached)
    weight_files.write({k: v + 1 for k, v in state.items()}, cached, hashed=True)
    flip_a_byte(kept)
    before = snapshot(kept.parent)
    with pytest.raises(StorageError, match=f"{kept}: damaged or lost.*copy the file again"):
        train_until(None, root, tmp_path)
    assert snapshot(kept.parent) == before


def test_a_trained_first_stage_does_not_depend_on_the_run_that_needs_it(tmp_path):
    """Two runs with other optimizers: whichever comes first, the cache holds the same."""
    made = []
    for i, override in enumerate(["optimizer=muon", "ema=none"]):
        root = small("vae=kl", "vae.ch=8", "vae.weights=auto", "data.clips_per_epoch=32", override)
        root = replace(root, cache=str(tmp_path / str(i)), vae=quick(root.vae))
        with session(root, tmp_path / f"out{i}") as training:
            made.append(training.system.first_stage.state_dict())
    assert not differing(made[0], made[1])


def quick(vae):
    """The same first stage, trained for two steps."""
    kind = type(vae)
    recipe = replace(vae.recipe(), steps=2)
    return type("Quick", (kind,), {"recipe": lambda self: recipe})(**vars(vae))


def test_a_first_stage_on_a_gpu_is_calibrated_and_measured_there():
    """FakeTensorMode has devices that are not there, and refuses to mix them as a real one does."""
    root = small("vae=kl", "vae.ch=8", "vae.num_groups=4", "data.clips_per_epoch=4")
    gpu, video = torch.device("cuda", 0), torch.zeros(2, 3, 1, 16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with gpu:
            first_stage = registry.create(root.vae)
        with pytest.raises(RuntimeError, match="device"):
            first_stage.encode(video)
        calibrate(root, first_stage, gpu)
        made = reconstruct(first_stage, video, gpu)
        assert (made.device.type, made.shape) == ("cpu", video.shape)


def test_the_default_cache_is_below_out_where_the_current_folder_cannot_be_written(
    tmp_path, monkeypatch
):
    root = replace(small(*AUTO), out=str(tmp_path / "out"))
    assert cache_path(root).parent == Path("outputs/cache")
    monkeypatch.chdir("/proc")
    made = prepared(root)
    assert [p.suffix for p in sorted((tmp_path / "out" / "cache").iterdir())] == [
        ".lock",
        ".safetensors",
    ]
    assert not differing(made, prepared(root))
    with pytest.raises(ConfigError, match=r"cache=mine: cannot be written"):
        prepared(replace(root, cache="mine"))
