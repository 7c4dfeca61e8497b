"""A profile of training steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback

from sandbox.contracts import CallbackConfig, in_range
from sandbox.registry import mask_text, register


@register("callbacks", "profile")
class Profile(Callback):
    """torch.profiler over some steps: profile.txt (most expensive ops), profile.json (trace)."""

    @dataclass
    class Config(CallbackConfig):
        """first: optimizer step at which profiling starts; steps: how many; rows: of the table.

        profile.json has the Chrome trace format.
        """

        first: int = 20
        steps: int = 20
        rows: int = 30

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("first", self.first, 0)
            yield from in_range("steps", self.steps, 1)
            yield from in_range("rows", self.rows, 1)

    training: Any  # sandbox.training.state.Training, set by the engine

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.done = cfg, False
        self.profiler: Any = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training.step == self.cfg.first and not self.done and self.profiler is None:
            self.profiler = torch.profiler.profile(record_shapes=False)
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.profiler is not None and self.training.step >= self.cfg.first + self.cfg.steps:
            self.write()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.profiler is not None:
            self.write()

    def write(self) -> None:
        """Stops the profiler and writes both files to the run folder."""
        profiler, self.profiler, self.done = self.profiler, None, True
        profiler.stop()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=self.cfg.rows)
        (self.training.run.folder / "profile.txt").write_text(mask_text(table) + "\n")
        profiler.export_chrome_trace(str(self.training.run.folder / "profile.json"))
        print(f"profile {self.training.run.folder / 'profile.txt'}", flush=True)
