"""Sessions of the real engine, stopped and resumed, and exact comparison of their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor

from sandbox.config.root import Root
from sandbox.config.wiring import wire
from sandbox.contracts import Preempted
from sandbox.distributed.rank import Rank
from sandbox.runs.resume import open_root
from sandbox.training.build import build_system
from sandbox.training.loop import fit
from sandbox.training.setup import start
from sandbox.training.state import Training
from tests.helpers import TINY, composed

Prepare = Callable[[Any], None]


@cache
def small(*overrides: str) -> Root:
    """The tiny system with `overrides`, wired; not to be changed."""
    given = {o.partition("=")[0] for o in overrides}
    return wire(composed(*(o for o in TINY if o.partition("=")[0] not in given), *overrides)).root


@contextmanager
def session(
    root: Root, out: Path, rank: Any = None, prepare: Prepare | None = None
) -> Iterator[Training]:
    """What a process does before `fit`: finds its run below `out` and continues it."""
    root = replace(root, out=str(out), cache=str(out / "cache"))
    with open_root(root) as run:
        system = build_system(wire(root), run.folder)
        if prepare:
            prepare(system)
        with start(system, run, rank=rank) as training:
            yield training


class StopAfter(Rank):
    """A process that gets a stop request after `step`."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def of(self, training: Training) -> None:
        self.training = training

    def agree_to_stop(self) -> str | None:
        return "the test" if self.training.step == self.step else None


def train_until(
    step: int | None, root: Root, out: Path, prepare: Prepare | None = None
) -> dict[str, Any]:
    """The state after a session that stops after `step`, or runs to the end."""
    rank = StopAfter(-1 if step is None else step)
    kept: dict[str, Any] = {}
    try:
        with session(root, out, rank, prepare) as training:
            rank.of(training)
            try:
                fit(training)
            finally:
                kept = deepcopy(training.state())
    except Preempted:
        assert step is not None
    return kept


class Recorder(Callback):
    """Copies of the state after each step."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.states: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, *rest: Any) -> None:
        if self.training.just_stepped:
            self.states[self.training.step] = deepcopy(self.training.state())


def record(root: Root, out: Path, prepare: Prepare | None = None) -> Recorder:
    """An uninterrupted run with its states by step."""
    with session(root, out, prepare=prepare) as training:
        recorder = Recorder(training)
        fit(training, [recorder])
    return recorder


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two states are not equal bit for bit."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        keys = [k for k in a if k in b]
        found = [f"{path}.{k} (in one)" for k in {*a} ^ {*b}]
        return found + [d for k in keys for d in differing(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple):
        found = [f"{path} (length)"] if len(a) != len(b) else []
        pairs = zip(a, b, strict=False)
        return found + [d for i, (x, y) in enumerate(pairs) for d in differing(x, y, f"{path}.{i}")]
    same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return [] if same else [path]
