"""Videos of fixed prompts while a system trains, so that its progress can be looked at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning import Callback

from sandbox.contracts import CallbackConfig, in_range
from sandbox.registry import register


@register("callbacks", "samples")
class Samples(Callback):
    """Samples from averaged weights every so many steps, as videos and a sheet."""

    @dataclass
    class Config(CallbackConfig):
        """every: optimizer steps; count: the data's prompts; prompts: captions in their place."""

        every: int = 500
        count: int = 8
        prompts: tuple[str, ...] = ()

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "count"):
                yield from in_range(name, getattr(self, name), 1)

    training: Any  # sandbox.training.Training; the engine sets it

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def on_train_batch_end(self, trainer: Any, system: Any, *rest: Any) -> None:
        if self.training.just_stepped and self.training.step % self.cfg.every == 0:
            self.training.sample(self.cfg.prompts, self.cfg.count)
