"""Image sheets at the steps of the published image loggers: powers of two, then every N."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning import Callback

from sandbox import registry
from sandbox.contracts import CallbackConfig, in_range, one_of
from sandbox.registry import register

ROWS = (
    "samples", "reconstruction", "diffusion_row", "progressive_row", "samples_x0_quantized",
    "samples_inpainting", "samples_outpainting",
)  # fmt: skip


@register("callbacks", "images")
class Images(Callback):
    """Sheets of samples by step or micro-batch, as in CompVis and DynamiCrafter."""

    @dataclass
    class Config(CallbackConfig):
        """every: interval in units of `unit`; unit: "step" or "micro_batch"; max_images: clips per
        sheet.

        increase_log_steps: also log at 1, 2, 4, ... below `every`.
        rows: sheets of a system; a first stage always shows reconstructions.
        progressive_steps: steps of ancestral sampling in progressive_row; as published all times of
        the schedule.
        """

        every: int = 500
        unit: str = "step"
        max_images: int = 8
        increase_log_steps: bool = True
        rows: tuple[str, ...] = ("samples",)
        progressive_steps: int = 1000

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("every", "max_images", "progressive_steps"):
                yield from in_range(name, getattr(self, name), 1)
            yield from one_of("unit", self.unit, ("step", "micro_batch"))
            for row in self.rows:
                yield from one_of("rows", row, ROWS)

        def due(self, number: int) -> bool:
            """Whether to log after step or micro-batch `number`, counted from 1."""
            is_power = number & (number - 1) == 0
            early = self.increase_log_steps and is_power and number < self.every
            return number % self.every == 0 or early

    training: Any  # sandbox.training.Training, set by the engine

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.taken = 0  # micro-batches

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict.get("taken", 0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.taken += 1
        by_step = self.cfg.unit == "step"
        if by_step and not self.training.just_stepped:
            return
        if self.cfg.due(self.training.step if by_step else self.taken):
            ancestral = registry.default("sampler", "ddpm")
            chain = replace(ancestral, steps=self.cfg.progressive_steps)
            self.training.show(self.cfg.rows, self.cfg.max_images, chain)
