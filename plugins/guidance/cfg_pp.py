"""CFG++: guidance of the clean estimate alone (Chung et al. 2024, 2406.08070)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided
from sandbox.contracts import FULL, GuidanceConfig, Pass, in_range
from sandbox.registry import register


@register("guidance", "cfg_pp")
class GuidedClean(Guided):
    """Interpolates the clean estimates of two passes, and steps along the unconditional noise.

    z0 of uncond + guidance_scale (full - uncond), and the noise of uncond (algorithm 2), so that
    samples stay near those that the network knows at any scale.
    """

    @dataclass
    class Config(GuidanceConfig):
        """guidance_scale: lambda, 0 (unconditional) to 1 (clean estimates of the full pass)."""

        guidance_scale: float = 0.6

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1)

        def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
            return (FULL, Pass(frozenset(signals))) if signals else (FULL,)

        def chooses_noise(self) -> bool:
            return True

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        return uncond + self.cfg.guidance_scale * (full - uncond)

    def noise(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        return outs[-1]
