"""Jobs for `tests/parallel_training.py`, and their results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import torch

from sandbox.config.root import to_container
from sandbox.runs.run import Run
from tests.launch_helpers import HERE
from tests.training_sessions import small

STEPS = 5

# Six micro-batches of four clips an epoch.
COMMON = ("data.clips_per_epoch=24", f"steps={STEPS}", "checkpoint.every=2", "trainer.clip=0.1")
TWO = ("data.batch_size=2", "trainer.timeout=60")
ONE = ("data.batch_size=4",)
# Where a stopped run is moved, to resume with other processes.
MOVES = ("trainer", "data.batch_size")


def job(name, out, *overrides, **more):
    root = small(*COMMON, *overrides)
    root = replace(root, out=str(out / more.pop("runs", name)), cache=str(out / "cache"))
    return {"name": name, "root": to_container(root), **more}


def moved(name, out, source, *overrides):
    """Goes on with a copy of the run of `source`, which was stopped."""
    wanted = job(name, out, *overrides)
    wanted["root"]["resume"] |= {"run": str(out / name), "allow": [*MOVES]}
    wanted["copy"] = str(out / source)
    return wanted


def done(out, jobs):
    """`out`, with the results of all `jobs`."""
    (out / "jobs").write_text(json.dumps(jobs))
    words = [sys.executable, str(HERE / "parallel_training.py"), str(out / "jobs"), str(out)]
    ended = subprocess.run(words, cwd=HERE.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return out


def states(out, name, rank=0):
    return torch.load(out / f"{name}-{rank}.pt", weights_only=True)


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def metrics(out, name):
    (path,) = (out / name).glob("*/metrics.jsonl")
    return Run(path.parent).metrics()


def assert_close(one, other):
    """Weights and average of each step of `other` within 1e-6: sums have another order."""
    assert other
    for step, state in other.items():
        for part in (lambda s: s["weights"], lambda s: s["ema"]["average"]):
            a, b = part(one[step]), part(state)
            assert a.keys() == b.keys()
            worst = max((a[name] - b[name]).abs().max().item() for name in a)
            assert worst <= 1e-6, (step, worst)
