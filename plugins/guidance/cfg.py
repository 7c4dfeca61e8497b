"""Classifier-free guidance (Ho & Salimans 2022, 2207.12598)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided, rescaled
from sandbox.contracts import GuidanceConfig, in_range
from sandbox.registry import register


@register("guidance", "cfg")
class ClassifierFree(Guided):
    """Classifier-free guidance: uncond + guidance_scale (full - uncond), two passes."""

    @dataclass
    class Config(GuidanceConfig):
        """guidance_scale: 1 uses the conditional output alone, in one pass.

        guidance_rescale: how far the standard deviation is restored to that of the full pass, 0 to
        1.
        """

        guidance_scale: float = 2.0
        guidance_rescale: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
            yield from in_range("guidance_rescale", self.guidance_rescale, 0, 1)

        def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
            if not signals or self.guidance_scale == 1:
                return (frozenset(),)
            return (frozenset(), frozenset(signals))

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        return rescaled(
            uncond + self.cfg.guidance_scale * (full - uncond), full, self.cfg.guidance_rescale
        )
