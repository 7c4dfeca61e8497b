"""A run that is killed or stopped repeatedly equals an uninterrupted run."""

from __future__ import annotations

import json
import random
import signal

import pytest

from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from tests.command import folder_of, reached, run_until, said
from tests.training_sessions import differing

pytestmark = pytest.mark.slow
STEPS = 40


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert run_until(out, None, signal.SIGKILL, f"steps={STEPS}") == 0, said(out)
    return folder_of(out)


def assert_equal_runs(one, other, steps=STEPS):
    states = [checkpoint.load(checkpoint.newest(f / "checkpoints")) for f in (one, other)]
    assert states[0]["step"] == states[1]["step"] == steps
    assert not differing(*states)  # weights, EMA, optimizer, loader
    found = [Run(f).metrics() for f in (one, other)]
    assert [*found[0]] == list(range(1, steps + 1))
    assert found[0] == found[1]  # every loss, gradient norm and learning rate
    scores = [json.loads((f / "result.json").read_text())["scores"] for f in (one, other)]
    assert scores[0] == scores[1]
    for name in (weight_files.LIVE, weight_files.AVERAGED):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.exhaustive
def test_kills_at_random_change_nothing(one, tmp_path):
    """Each kill follows new logged steps; the number of data workers changes too."""
    dice, kills = random.Random(7), 0
    for workers in (0, 2, 0):
        target = reached(tmp_path) + dice.randint(2, 9)
        words = (f"steps={STEPS}", f"data.num_workers={workers}")
        kills += run_until(tmp_path, target, signal.SIGKILL, *words) == -signal.SIGKILL
    assert kills == 3
    assert run_until(tmp_path, None, signal.SIGKILL, f"steps={STEPS}") == 0, said(tmp_path)
    assert said(tmp_path).count("(resumed)") == 3
    assert_equal_runs(one, folder_of(tmp_path))


def test_kills_with_three_networks_change_nothing(tmp_path):
    """A frozen teacher, a student, and a critic that trains twice a step."""
    assert run_until(tmp_path / "teacher", None, signal.SIGKILL, "steps=5") == 0
    words = ("steps=20", "method=dmd", "method.turns=2", "sampler=lcm", "sampler.steps=4",
             "guidance=none", f"method.teacher={folder_of(tmp_path / 'teacher')}",
             "trainer.accumulate=1")  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_until(whole, None, signal.SIGKILL, *words) == 0, said(whole)
    for step in (7, 14):
        assert run_until(killed, step, signal.SIGKILL, *words) == -signal.SIGKILL
    assert run_until(killed, None, signal.SIGKILL, *words) == 0, said(killed)
    assert_equal_runs(folder_of(whole), folder_of(killed), 20)


def test_signals_to_the_process_group_save_and_exit_with_75(one, tmp_path):
    words = (f"steps={STEPS}", "data.num_workers=2")
    for step, number in ((8, signal.SIGTERM), (16, signal.SIGINT)):
        assert run_until(tmp_path, step, number, *words) == 75, said(tmp_path)
        assert f"stopped by {number.name} after step" in said(tmp_path)
    assert run_until(tmp_path, None, signal.SIGKILL, *words) == 0, said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert_equal_runs(one, folder_of(tmp_path))
