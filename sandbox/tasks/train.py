"""task=train: first stage, training, samples, scores and a page."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.config.registry import register
from sandbox.contracts import TaskConfig, in_range
from sandbox.distributed.rank import Rank


@register("task", "train")
@dataclass
class Train:
    """Trains a system, samples from it, scores it and writes a run folder with a page."""

    @dataclass
    class Config(TaskConfig):
        """score_clips: clips to score; samples: clips to write as videos.

        untrained: also score an untrained model; objective: the value for sweepers, a score or
        "loss" (mean over the last tenth of the steps); null takes the metric's first score.
        """

        score_clips: int = 192
        samples: int = 12
        untrained: bool = True
        objective: str | None = None

        def problems(self) -> Iterator[str]:
            yield from in_range("score_clips", self.score_clips, 1)
            yield from in_range("samples", self.samples, 0)

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from sandbox.distributed.supervisor import launch_run

        return launch_run("sandbox.tasks.train:train", wiring.root, overrides, group)


def train(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """The work of one rank. Returns the result of rank 0, the only one that writes and scores.

    `settings` are those of `launch_run`.
    """
    from sandbox.config.composition import receive_root
    from sandbox.config.wiring import wire
    from sandbox.model.devices import use_threads
    from sandbox.runs.resume import open_on_rank0, resumes
    from sandbox.training.build import build_system, check_weights
    from sandbox.training.finish import check_objective, finish_run
    from sandbox.training.loop import fit
    from sandbox.training.setup import check_best, checked_loader, start
    from sandbox.weights.init_from import init_from

    began = time.monotonic()
    wiring = wire(receive_root(settings["root"]))
    root = wiring.root
    use_threads(root)
    check_objective(root, root.task.objective)
    check_best(wiring)
    check_weights(wiring, begins=not resumes(root))
    loader = checked_loader(root, rank)
    with open_on_rank0(root, rank) as run:
        print(f"run folder: {run.folder}" + (" (resumed)" if run.resumed else ""), flush=True)
        with rank.rank0_first():  # it trains the first stage if needed; the others load it
            is_given = root.init_from is not None
            system = build_system(wiring, run.folder, rank, empty=is_given)
        ready = time.monotonic()

        def initialise() -> None:
            if root.init_from is not None and root.adapter is None:
                init_from(system, root.init_from)

        with start(system, run, settings["group"], rank, initialise, loader) as training:
            fit(training)
            training.unshard(lambda: build_system(wiring, run.folder, rank.as_single(), True))
            seconds = {"first stage": ready - began, "training": time.monotonic() - ready}
            with rank.rank0_first():
                if rank.index > 0:
                    return {}
                return finish_run(training, root.task, settings["overrides"], seconds)
