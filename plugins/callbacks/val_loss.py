"""The validation loss during training, also at fixed times (Esser et al. 2024, 2403.03206)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning import Callback

from sandbox.contracts import CallbackConfig, added, in_range
from sandbox.registry import register


@register("callbacks", "val_loss")
class ValLoss(Callback):
    """Loss on held-out clips at a fixed interval, of live and EMA weights, also at fixed times."""

    @dataclass
    class Config(CallbackConfig):
        """every: optimizer steps between validations; clips: number of clips, always with the same
        noise. times: number of equidistant times, from the clean end to the noisy one, at which
        the denoising loss is measured (val_times/); 0: none. Its clips and noise are the same in
        all runs, whatever their seed, and no condition is dropped.
        """

        every: int = 200
        clips: int = 192
        times: int = added(0)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "clips"):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("times", self.times, 0, 100)

        def measures(self, step: int) -> bool:
            return step % self.every == 0

        def metrics(self) -> tuple[str, ...]:
            places = [f"{(i + 0.5) / self.times:.4f}" for i in range(self.times)]
            return tuple(f"val_times/{name}" for name in (*places, "mean")) if places else ()

    training: Any  # sandbox.training.state.Training, set by the engine

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training.just_stepped and self.training.step % self.cfg.every == 0:
            self.training.validate(self.cfg.clips, self.cfg.times)
