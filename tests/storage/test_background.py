"""Checkpoints that are written in a thread are those of a plain save, also after a kill."""

import multiprocessing
import os
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from sandbox.contracts import Diverged, StorageError
from sandbox.storage import checkpoint
from sandbox.storage.background import BackgroundWriter, copied_state
from tests.bad_files import largest_file, names

FORK = multiprocessing.get_context("fork")
SIZE = 1_000_000


def state(step: int) -> dict:
    table = torch.full((SIZE,), float(step))
    odd = torch.arange(12.0).view(3, 4).t()
    return {
        "tied": OrderedDict(a=table, b=table.view(1000, -1), part=table[3:9]),
        "odd": [odd, (torch.ones(2, dtype=torch.bfloat16), None)],
        "loader": {"taken": step, "names": ["x"]},
    }


def write(writer: BackgroundWriter, folder: Path, step: int, **settings) -> None:
    copied = copied_state(state(step))
    writer.start(lambda: checkpoint.save(folder, copied, step, **settings))


def test_a_copy_is_saved_to_the_same_bytes(tmp_path):
    whole = state(1)
    plain = checkpoint.save(tmp_path / "plain", whole, 1)
    copied = checkpoint.save(tmp_path / "copied", copied_state(whole), 1)
    assert plain.read_bytes() == copied.read_bytes()


def test_later_changes_of_the_state_are_not_saved(tmp_path):
    writer, whole = BackgroundWriter(), state(1)
    copied, go = copied_state(whole), threading.Event()
    writer.start(lambda: (go.wait(), checkpoint.save(tmp_path, copied, 1)))
    whole["tied"]["a"].fill_(7)
    whole["loader"]["names"].append("y")
    go.set()
    writer.wait()
    found = checkpoint.load(checkpoint.newest(tmp_path))
    assert found["tied"]["b"].eq(1).all() and found["loader"]["names"] == ["x"]


def test_at_most_one_write_at_a_time_and_in_order():
    writer, running, order = BackgroundWriter(), [], []

    def job(number: int) -> None:
        running.append(number)
        time.sleep(0.02)
        assert running == [number]
        running.remove(number)
        order.append(number)

    for number in range(4):
        writer.start(lambda n=number: job(n))
    writer.wait()
    assert order == [0, 1, 2, 3]


def test_a_full_disk_in_the_background_is_the_same_error_once(tmp_path):
    writer = BackgroundWriter()
    write(writer, tmp_path, 1)
    writer.wait()
    before = names(tmp_path)
    with largest_file(50_000):
        write(writer, tmp_path, 2, wait=0)
        with pytest.raises(StorageError, match=r"step 2.*too large.*3 attempts.*intact"):
            writer.wait()
    assert names(tmp_path) == before
    writer.check()
    write(writer, tmp_path, 3)
    writer.wait()
    assert checkpoint.load(checkpoint.newest(tmp_path))["loader"]["taken"] == 3


def test_check_raises_without_waiting():
    writer, go = BackgroundWriter(), threading.Event()

    def fail() -> None:
        go.wait()
        raise StorageError("full")

    writer.start(fail)
    writer.check()  # still running
    go.set()
    with pytest.raises(StorageError, match="full"):
        while True:
            writer.check()


def test_numbers_that_are_not_finite_are_never_saved(tmp_path):
    writer, bad = BackgroundWriter(), copied_state({"w": torch.tensor([1.0, float("nan")])})
    writer.start(lambda: checkpoint.save(tmp_path, bad, 1))
    with pytest.raises(Diverged):
        writer.wait()
    assert not names(tmp_path)


def save_until_killed(folder: Path, first: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    writer = BackgroundWriter()
    for step in range(first, first + 1000):
        write(writer, folder, step)


def test_a_kill_during_a_background_write_leaves_a_good_checkpoint(tmp_path):
    checkpoint.save(tmp_path, state(0), 0)
    reached = in_a_write = 0
    for kill in range(6):
        child = FORK.Process(target=save_until_killed, args=(tmp_path, reached + 1))
        child.start()
        deadline = time.monotonic() + 20
        while not (parts := list(tmp_path.glob(".*.part"))) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(0.003 * kill)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        in_a_write += bool(parts)
        found = checkpoint.load(checkpoint.newest(tmp_path))
        assert found["loader"]["taken"] >= reached
        assert found["tied"]["a"].eq(found["loader"]["taken"]).all()
        reached = found["loader"]["taken"]
    assert in_a_write == 6
    checkpoint.save(tmp_path, state(reached + 1), reached + 1)
    assert not [n for n in names(tmp_path) if n.endswith(".part")]
