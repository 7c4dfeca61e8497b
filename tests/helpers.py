"""A small system, composed as the command composes it and trained by the real engine, for many tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandbox import compose
from sandbox.config import Root, to_container
from sandbox.contracts import PluginConfig

TINY = (
    "vae.weights=null",
    "backbone.width=8",
    "backbone.num_blocks=1",
    "backbone.time_features=8",
    "conditioning.width=8",
    "conditioning.buckets=32",
    "sampler.steps=2",
    "data.batch_size=2",
    "data.clips_per_epoch=16",
    "logger=null",
    "steps=2",
)


def tiny(*overrides: str) -> Root:
    """The default system in a size that takes a step in milliseconds, with `overrides`; wired."""
    return compose(*TINY, *overrides)


@dataclass
class Trained:
    """What two steps leave: the system, its losses by step, and the folder of the run."""

    system: Any
    losses: list[float]
    folder: Path


def train(root: Root, out: Path) -> Trained:
    """Trains `root.steps` steps with the real engine in a run folder of `out`; no scores, no page."""
    from sandbox.runs import open_run
    from sandbox.systems import build_system
    from sandbox.training import fit, start
    from sandbox.wiring import wire

    root = replace(root, out=str(out), cache=str(out / "cache"))
    with open_run(root.out, "run", to_container(root), "never") as run:
        system = build_system(wire(root), run.folder)
        with start(system, run) as training:
            fit(training)
        losses = [row["loss"] for row in run.metrics().values()]
    return Trained(system, losses, run.folder)


def fields_of(cfg: PluginConfig) -> dict[str, Any]:
    """The settings of a Config by name, without the name of its plugin."""
    return {k: v for k, v in vars(cfg).items() if k != "plugin"}
