"""Damaged or occupied run folders: what is broken is named, and a refusal changes no file."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.contracts import SandboxError, StorageError
from sandbox.runs.resume import open_run
from sandbox.runs.run import Run
from sandbox.storage import checkpoint
from sandbox.storage.locks import COMMAND, FileLock, locked
from sandbox.training.build import load_system
from tests.bad_files import DAMAGES, cut_in_half, flip_a_byte, snapshot
from tests.storage.test_checkpoint import BREAKS
from tests.training_sessions import small, train_until

SETTINGS = ("data.clips_per_epoch=13", "steps=6", "checkpoint.every=3")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The `out` of a run that was stopped after step 4; checkpoints of steps 3 and 4."""
    out = tmp_path_factory.mktemp("stopped")
    train_until(4, small(*SETTINGS), out)
    return out


@pytest.fixture
def out(stopped, tmp_path) -> Path:
    """A copy of that, with all times of change."""
    subprocess.run(["cp", "-a", f"{stopped}/.", str(tmp_path / "out")], check=True)
    return tmp_path / "out"


def folder_in(out: Path) -> Path:
    (found,) = out.glob("*/config.yaml")
    return found.parent


def refused(root, out: Path, kind: type[SandboxError] = SandboxError) -> str:
    """The error of the same command again, which leaves every file as it was."""
    before = snapshot(out)
    with pytest.raises(kind) as e:
        train_until(None, root, out)
    assert snapshot(out) == before
    assert "Traceback" not in str(e.value)
    return str(e.value)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*BREAKS, *DAMAGES])
@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_whose_checkpoints_are_all_broken_is_refused(out, damage, is_named):
    folder, root = folder_in(out), small(*SETTINGS)
    first, second = checkpoint.checkpoints(folder / "checkpoints")
    for path in (second, second.with_suffix(".json")):
        path.unlink()
    damage(first)
    if is_named:
        root = replace(root, resume=replace(root.resume, run=str(folder)))
    message = refused(root, out, StorageError)
    assert "all checkpoints of this run are broken, 1 in all" in message
    assert first.stem in message and "resume=never" in message
    with pytest.raises(StorageError, match="all checkpoints of this run are broken"):
        load_system(folder)
    again = replace(root, resume=replace(root.resume, run=None, mode="never"))
    assert train_until(None, again, out)["step"] == 6  # as the message says
    assert sorted(p.name for p in out.glob("default-*")) == [folder.name, f"{folder.name}-2"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_stopped_run_with_a_damaged_record_is_refused_by_its_command(out, name, damage):
    damage(folder_in(out) / name)
    assert str(folder_in(out) / name) in refused(small(*SETTINGS), out, StorageError)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_in_half])
def test_the_checkpoint_before_a_broken_one_is_used(out, damage, caplog, capsys):
    folder = folder_in(out)
    newest = checkpoint.checkpoints(folder / "checkpoints")[0]
    damage(newest)
    assert train_until(None, small(*SETTINGS), out)["step"] == 6
    assert f"skipped checkpoint: {newest}" in caplog.text
    assert "resuming from step 3 (step_00000003.ckpt)" in capsys.readouterr().out


def test_a_kill_before_the_first_checkpoint_has_its_name_is_no_damage(tmp_path):
    path = checkpoint.save(tmp_path, {"step": 1}, 1)
    path.rename(path.with_name(f".{path.name}.part"))
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.save(tmp_path, {"step": 1}, 1) == path
    assert checkpoint.newest(tmp_path) == path


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "another shape": (["backbone.width=16"], ["backbone.width"], "weights do not fit"),
    "another depth": (["backbone.num_blocks=2"], ["backbone"], "weights do not fit"),
    "another text": (["conditioning.width=16"], ["conditioning", "backbone"], "weights do not fit"),
    "another setting": (["lr=0.5"], [], r"resume\.allow=\[lr\]"),
    "fewer steps": (["steps=2"], [], "steps: was 6"),
    "another batch": (["data.batch_size=3"], ["data"], "micro-batches"),
    "other data": (["data.clips_per_epoch=30"], ["data.clips_per_epoch"], "clips"),
    "another optimizer": (["trainable=[blocks]"], ["trainable"], "optimizer|fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_resume_that_is_refused_changes_no_file(out, name):
    changes, allow, message = REFUSED[name]
    folder = folder_in(out)
    given = {c.partition("=")[0] for c in changes}
    root = small(*(o for o in SETTINGS if o.partition("=")[0] not in given), *changes)
    root = replace(root, resume=replace(root.resume, run=str(folder), allow=tuple(allow)))
    found = refused(root, out)
    assert re.search(message, found), found
    assert train_until(None, small(*SETTINGS), out)["step"] == 6  # nothing is locked or lost


def test_a_finished_run_whose_extension_is_refused_stays_finished(out):
    train_until(None, small(*SETTINGS), out)
    folder = folder_in(out)
    with Run(folder) as run:
        run.finish({"steps": 6})
    root = small("data.clips_per_epoch=13", "steps=9", "checkpoint.every=3", "backbone.width=16")
    allow = ("backbone.width",)
    refused(replace(root, resume=replace(root.resume, run=str(folder), allow=allow)), out)
    assert Run(folder).finished


# --- locks ----------------------------------------------------------------------------------------

HERE = socket.gethostname()
HOLD = """
import os, sys, time
os.environ[sys.argv[2]] = str(os.getppid())
from pathlib import Path
from sandbox.storage.locks import FileLock
assert FileLock(Path(sys.argv[1])).take()
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds, which a command (here: this process) has started."""
    path = tmp_path / "lock"
    words = [sys.executable, "-c", HOLD, str(path), COMMAND]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield path
        other.kill()


def test_a_lock_names_the_command_and_the_host_and_dies_with_its_process(held):
    lock = FileLock(held)
    assert not lock.take()
    assert lock.holder().startswith(f"process {os.getpid()} on host {HERE} (since 20")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"{}", b'{"process": "x", "host": 1}', b"99999",
     json.dumps({"process": 2**70, "host": HERE, "since": ""}).encode(),
     json.dumps({"process": 2**22 + 1, "host": HERE, "since": "dead"}).encode()],
)  # fmt: skip
def test_a_lock_with_another_text_still_locks_and_names_nobody(held, content):
    held.write_bytes(content)
    lock = FileLock(held)
    assert not lock.take() and lock.holder() == "another process"


def test_a_lock_of_a_dead_process_is_taken(tmp_path):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"process": 2**22 + 1, "host": HERE, "since": "x"}))
    lock = FileLock(path)
    assert lock.take() and lock.left == ""
    lock.release()
    assert path.read_bytes() == b""


def test_a_process_of_another_host_that_has_not_ended_is_named(tmp_path, caplog):
    with open_run(tmp_path, "x", {"lr": 1}) as run:
        pass
    other = json.dumps({"process": 7, "host": "elsewhere", "since": "noon"})
    (run.folder / "lock").write_text(other)
    with open_run(tmp_path, "x", {"lr": 1}) as again:
        again.accept()
    assert "process 7 on host elsewhere (since noon) was running in it" in caplog.text


def test_a_start_that_is_not_accepted_leaves_the_lock_as_it_was(tmp_path):
    with open_run(tmp_path, "x", {"lr": 1}):
        pass
    before = snapshot(tmp_path)
    with open_run(tmp_path, "x", {"lr": 1}) as run:
        assert json.loads((run.folder / "lock").read_text())["process"] == os.getpid()
    assert snapshot(tmp_path) == before


def test_the_same_command_twice_names_the_first_and_has_a_folder_of_its_own(tmp_path, caplog):
    with open_run(tmp_path, "x", {"lr": 1}) as one, open_run(tmp_path, "x", {"lr": 1}) as other:
        assert other.folder != one.folder
    assert f"{one.folder}: process {os.getpid()} on host {HERE}" in caplog.text


def test_a_job_that_waits_for_a_cache_names_the_one_that_writes_it(tmp_path):
    path, ready, printed = tmp_path / "first.safetensors", threading.Event(), io.StringIO()

    def hold() -> None:
        with locked(path):
            ready.set()
            while "waiting for" not in printed.getvalue():
                time.sleep(0.01)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait()
    with redirect_stdout(printed), locked(path):
        thread.join()
    assert f"waiting for process {os.getpid()} on host {HERE}" in printed.getvalue()
