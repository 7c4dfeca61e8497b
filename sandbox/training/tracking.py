"""Writes metrics, videos and images to the run folder and to a tracker.

A tracker never ends a run: one that fails is reported once and removed. The run's own metrics.jsonl
is authoritative, and a run that cannot write it raises a StorageError.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sandbox.config.secrets import mask, mask_text
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    Mean = Callable[[Tensor], Tensor]

NAMED = 8  # samples that an error lists
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A `logger` plugin. Steps are optimizer steps and may repeat after a resume."""

    def start(self, folder: Path, config: dict[str, Any], name: str, group: str | None) -> None:
        """Called first: the run folder, its config without secrets, the name of a multirun."""

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step."""

    def video(self, step: int, name: str, path: Path, caption: str = "") -> None:
        """An encoded file (.mp4)."""

    def images(
        self, step: int, name: str, paths: Sequence[Path], captions: Sequence[str] = ()
    ) -> None:
        """Image files, with a caption each or none at all."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final metrics of the run."""

    def finish(self, exit_code: int) -> None:
        """Called last, also after a failure, with the exit code of the program."""


class PageTracker(Tracker, Protocol):
    """A tracker that also takes a report (task.send)."""

    def start(
        self,
        folder: Path,
        config: dict[str, Any],
        name: str,
        group: str | None,
        sweep: str | None = None,
    ) -> None:
        """`sweep`: the id of its sweep, where that is not the agent's own."""

    def page(self, name: str, path: Path) -> None:
        """A self-contained HTML page."""

    def table(self, name: str, rows: Sequence[Sequence[str]]) -> None:
        """Rows of text; the first is the header."""


class Trackers:
    """The run's metrics file and its trackers."""

    def __init__(self, run: Run, trackers: Iterable[Tracker] = ()) -> None:
        self.run, self.trackers = run, list(trackers)

    def start(self, config: Mapping[str, Any], name: str, group: str | None = None) -> None:
        shown = mask(config)
        self._each(lambda t: t.start(self.run.folder, shown, name, group))

    def metrics(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Metrics of several steps, in one write. Raises StorageError."""
        self.run.record_all(rows)
        for step, metrics in rows:
            self._each(lambda t, s=step, m=metrics: t.metrics(s, m))

    def video(self, step: int, name: str, path: Path, caption: str = "") -> None:
        """A clip as a file: .mp4, or .png for a single frame."""
        if path.suffix == ".png":
            self.images(step, name, [path], [caption])
        else:
            self._each(lambda t: t.video(step, name, path, mask_text(caption)))

    def images(
        self, step: int, name: str, paths: Sequence[Path], captions: Sequence[str] = ()
    ) -> None:
        self._each(lambda t: t.images(step, name, paths, [mask_text(c) for c in captions]))

    def summary(self, values: Mapping[str, Any]) -> None:
        shown = mask(values)
        self._each(lambda t: t.summary(shown))

    def finish(self, exit_code: int = 0) -> None:
        self._each(lambda t: t.finish(exit_code))
        self.trackers = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as e:  # third-party code and networks: the run continues anyway
                self.trackers.remove(tracker)
                log.warning(
                    "%s failed and is not used from now on (%s: %s); all metrics are in %s",
                    type(tracker).__name__,
                    type(e).__name__,
                    e,
                    self.run.metrics_file,
                )


class MetricBuffer:
    """Buffers metrics on their device, to transfer them together with one device sync.

    Flush it before a checkpoint is saved: a resumed run does not repeat earlier steps.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, dict[str, Tensor | float]]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Tensors are () and not modified later. Raises ValueError for other shapes."""
        row: dict[str, Tensor | float] = {}
        for name, value in metrics.items():
            if getattr(value, "ndim", 0):
                raise ValueError(f"metric {name} has shape {tuple(value.shape)}: want one number")  # type: ignore[union-attr]
            row[name] = value if isinstance(value, int | float) else value.detach()
        self._rows.append((step, row))

    def flush(self, mean: Mean | None = None) -> list[tuple[int, dict[str, float]]]:
        """The metrics since the last flush, as numbers, in order.

        `mean` averages the stacked tensors of this process over all processes.
        """
        rows, self._rows = self._rows, []
        tensors = [v for _, row in rows for v in row.values() if not isinstance(v, int | float)]
        numbers: Iterator[float] = iter(())
        if tensors:  # one transfer for all; float32 and float64 arrive exactly
            import torch

            stacked = torch.stack([t.to(tensors[0].device) for t in tensors])
            numbers = iter((mean(stacked) if mean else stacked).tolist())
        return [
            (step, {k: v if isinstance(v, int | float) else next(numbers) for k, v in row.items()})
            for step, row in rows
        ]


@dataclass
class TrainedOn:
    """The samples of one micro-batch, and their losses (B,) if the system reports them."""

    ids: list[str]
    losses: Tensor | None

    def bad(self) -> list[str]:
        """Samples with a loss that is not finite."""
        losses = [] if self.losses is None else self.losses.tolist()
        return [i for i, loss in zip(self.ids, losses, strict=False) if not math.isfinite(loss)]


def suspects(trained_on: list[TrainedOn], rank: Rank) -> str:
    """The samples of all ranks whose loss is not finite; if there are none, all of the step."""
    bad = [i for batch in trained_on for i in batch.bad()]
    of_ranks = rank.gather_plain([bad, [i for batch in trained_on for i in batch.ids]])
    bad = [i for part, _ in of_ranks for i in part]
    ids = bad or [i for _, part in of_ranks for i in part]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    what = "samples with such a loss" if bad else "samples of this step"
    return f"{what}: {', '.join(ids[:NAMED])}{more}"
