"""Latents that are the pixels: diffusion without a first stage."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import PointPosterior
from sandbox.contracts import Clip, FirstStageConfig, above, in_range
from sandbox.registry import register


@register("vae", "identity")
class Identity(FirstStage):
    """Pixels are the latents; nothing to train."""

    @dataclass
    class Config(FirstStageConfig):
        scale_factor: float = 1.0
        shift: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("scale_factor", self.scale_factor, 0)
            yield from in_range("shift", self.shift, -100, 100)

        def latents(self, clip: Clip) -> Clip:
            return clip

        def fitted(self) -> str:
            return "none"

        def regularizer(self) -> str:
            return "none"

    def __init__(self, cfg: Config) -> None:
        super().__init__(3, cfg.scale_factor, cfg.shift)

    def encode(self, x: Tensor) -> PointPosterior:
        return PointPosterior(x)

    def posterior(self, stored: Tensor) -> PointPosterior:
        return PointPosterior(stored)

    def pixels(self, z: Tensor) -> Tensor:
        return z
