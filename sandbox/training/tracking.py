"""Writes metrics, videos and images to the run folder and to a tracker.

A tracker never ends a run: one that fails is reported once and removed. The run's own metrics.jsonl
is authoritative, and a run that cannot write it raises a StorageError.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.config.secrets import mask, mask_text
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run

# Samples and their losses (B,), of each micro-batch of a step
TrainedOn = Sequence[tuple[list[str], Tensor]]
Mean = Callable[[Tensor], Tensor]
NAMED = 8  # samples that an error lists
log = logging.getLogger(__name__)


class Trackers:
    """The run's metrics file and its trackers: `logger` plugins, called in this order.

        start(folder, config, name, group)    config without secrets, name of a multirun
        metrics(step, metrics)                a step is an optimizer step; a resume may repeat it
        video(step, name, path, caption)      an encoded file (.mp4)
        images(step, name, paths, captions)   image files, with a caption each or none at all
        summary(values)                       final metrics
        finish(exit_code)                     also after a failure

    task.send=true also needs start(..., sweep), the id of a sweep; page(name, path), one HTML file;
    and table(name, rows), text with the header first.
    """

    def __init__(self, run: Run, trackers: Iterable[Any] = ()) -> None:
        self.run, self.trackers = run, list(trackers)

    def start(self, config: Mapping[str, Any], name: str, group: str | None = None) -> None:
        self._each(lambda t: t.start(self.run.folder, mask(config), name, group))

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
        self._each(lambda t: t.summary(mask(values)))

    def finish(self, exit_code: int = 0) -> None:
        self._each(lambda t: t.finish(exit_code))
        self.trackers = []

    def _each(self, call: Callable[[Any], None]) -> None:
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
        self.rows: list[tuple[int, Mapping[str, Tensor | float], TrainedOn]] = []

    def add(
        self, step: int, metrics: Mapping[str, Tensor | float], trained_on: TrainedOn = ()
    ) -> None:
        """Tensors are () and not modified later. Raises ValueError for other shapes."""
        for name, value in metrics.items():
            if getattr(value, "ndim", 0):
                raise ValueError(f"metric {name} has shape {tuple(value.shape)}: want one number")  # type: ignore[union-attr]
        row = {k: v if isinstance(v, int | float) else v.detach() for k, v in metrics.items()}
        self.rows.append((step, row, trained_on))

    def flush(self, mean: Mean) -> list[tuple[int, dict[str, float], TrainedOn]]:
        """Steps, metrics and samples since the last flush, in order.

        `mean` averages the stacked tensors of this process over all processes.
        """
        rows, self.rows = self.rows, []
        tensors = [v for _, row, _ in rows for v in row.values() if not isinstance(v, int | float)]
        numbers: Iterator[float] = iter(())
        if tensors:  # one transfer for all; float32 and float64 arrive exactly
            stacked = torch.stack([t.to(tensors[0].device) for t in tensors])
            numbers = iter(mean(stacked).tolist())
        return [
            (s, {k: v if isinstance(v, int | float) else next(numbers) for k, v in row.items()}, of)
            for s, row, of in rows
        ]


def suspects(trained_on: TrainedOn, rank: Rank) -> str:
    """The samples of all ranks whose loss is not finite; if there are none, all of the step."""
    losses = [(i, x) for ids, of in trained_on for i, x in zip(ids, of.tolist(), strict=True)]
    bad = [i for i, loss in losses if not math.isfinite(loss)]
    of_ranks = rank.gather_plain([bad, [i for i, _ in losses]])
    bad = [i for part, _ in of_ranks for i in part]
    ids = bad or [i for _, part in of_ranks for i in part]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    what = "samples with such a loss" if bad else "samples of this step"
    return f"{what}: {', '.join(ids[:NAMED])}{more}"
