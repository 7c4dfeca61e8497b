"""task=train: first stage, training, scores, samples and a page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox.contracts import TaskConfig, in_range
from sandbox.registry import register

if TYPE_CHECKING:
    from sandbox.rank import Rank


@register("task", "train")
class Train:
    """Trains a system, samples from it, scores it and writes a run folder with a page."""

    @dataclass
    class Config(TaskConfig):
        """score_clips: clips that are scored; samples: clips written as videos.

        untrained: also score an untrained model; objective: what a sweeper gets of the run, a score
        or "loss" (mean over the last tenth of the steps); null takes the metric's first score.
        """

        score_clips: int = 192
        samples: int = 12
        untrained: bool = True
        objective: str | None = None

        def problems(self) -> Iterator[str]:
            yield from in_range("score_clips", self.score_clips, 1)
            yield from in_range("samples", self.samples, 0)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from sandbox.config import to_container
        from sandbox.rank import Rank

        root = to_container(wiring.root)
        return train({"root": root, "overrides": [*overrides], "group": group}, Rank())


def train(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """All of the work in one process.

    `settings` are plain: "root" (a whole configuration), "overrides" as they were typed, "group" of
    a multirun or None.
    """
    from sandbox.config import from_container
    from sandbox.initialise import init_from
    from sandbox.outcome import check_objective, finish_run
    from sandbox.runs import open_root
    from sandbox.systems import build_system
    from sandbox.training import fit, start
    from sandbox.wiring import wire

    began = time.monotonic()
    wiring = wire(from_container(settings["root"]))
    root = wiring.root
    check_objective(root, root.task.objective)
    with open_root(root) as run:
        print(f"run folder: {run.folder}" + (" (continued)" if run.resumed else ""), flush=True)
        system = build_system(wiring, run.folder)
        if root.init_from is not None and root.adapter is None:
            init_from(system, root.init_from)
        ready = time.monotonic()
        with start(system, run, settings["group"], rank) as training:
            fit(training)
            seconds = {"first stage": ready - began, "training": time.monotonic() - ready}
            return finish_run(training, root.task, settings["overrides"], seconds)
