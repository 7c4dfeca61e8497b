"""task=train: first stage, training, scores, samples and a page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import TaskConfig, in_range
from sandbox.registry import register


@register("task", "train")
class Train:
    """Trains a system, samples from it, scores it and writes a run folder with a page (the default)."""

    @dataclass
    class Config(TaskConfig):
        """score_clips: clips that are scored; samples: clips written as videos; untrained: also score an untrained model."""

        score_clips: int = 192
        samples: int = 12
        untrained: bool = True

        def problems(self) -> Iterator[str]:
            yield from in_range("score_clips", self.score_clips, 1)
            yield from in_range("samples", self.samples, 0)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None) -> dict[str, Any]:
        from sandbox import registry
        from sandbox.config import to_container
        from sandbox.outcome import finish_run
        from sandbox.runs import open_run
        from sandbox.systems import build_system
        from sandbox.training import fit, start

        root, began = wiring.root, time.monotonic()
        with open_run(root.out, root.recipe, to_container(root), registry.create(root.resume).which(), root.resume.allow) as run:
            print(f"run folder: {run.folder}" + (" (continued)" if run.resumed else ""), flush=True)
            system = build_system(wiring, run.folder)
            ready = time.monotonic()
            with start(system, run, group) as training:
                fit(training)
                seconds = {"first stage": ready - began, "training": time.monotonic() - ready}
                return finish_run(training, self.cfg, list(overrides), seconds)
