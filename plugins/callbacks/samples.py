"""Videos of fixed prompts during training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning import Callback

from sandbox.contracts import CallbackConfig, in_range
from sandbox.registry import register


@register("callbacks", "samples")
class Samples(Callback):
    """Samples from EMA weights at a fixed interval, as videos and a sheet."""

    @dataclass
    class Config(CallbackConfig):
        """every: optimizer steps between samples; count: number of prompts from the data; prompts:
        captions to use instead.
        """

        every: int = 500
        count: int = 8
        prompts: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "count"):
                yield from in_range(name, getattr(self, name), 1)

    training: Any  # sandbox.training.Training, set by the engine

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training.just_stepped and self.training.step % self.cfg.every == 0:
            self.training.sample(self.cfg.prompts, self.cfg.count)
