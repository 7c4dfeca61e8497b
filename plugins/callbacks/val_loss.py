"""The validation loss during training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning import Callback

from sandbox.contracts import CallbackConfig, in_range
from sandbox.registry import register


@register("callbacks", "val_loss")
class ValLoss(Callback):
    """Loss on held-out clips at a fixed interval, of live and EMA weights."""

    @dataclass
    class Config(CallbackConfig):
        """every: optimizer steps between validations; clips: number of clips, always with the same
        noise.
        """

        every: int = 200
        clips: int = 192

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "clips"):
                yield from in_range(name, getattr(self, name), 1)

        def measures(self, step: int) -> bool:
            return step % self.every == 0

    training: Any  # sandbox.training.Training, set by the engine

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training.just_stepped and self.training.step % self.cfg.every == 0:
            self.training.validate(self.cfg.clips)
