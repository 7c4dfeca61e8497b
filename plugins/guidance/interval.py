"""Guidance in an interval of noise levels (Kynkaanniemi et al. 2024, 2404.07724)."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided, rescale_std
from plugins._configs.guidance import TwoPassConfig, interval_problems, is_within
from sandbox.contracts import Pass
from sandbox.registry import register


@register("guidance", "interval")
class Interval(Guided):
    """Classifier-free guidance between two steps; the others run the conditional pass alone."""

    @dataclass
    class Config(TwoPassConfig):
        """start, stop: the guided steps, as fractions of all steps from noise (0) to clean (1).

        The paper's interval of noise levels leaves out the first, noisiest steps, where guidance
        reduces diversity, and the last ones, where it has little effect.
        """

        guidance_scale: float = 3.0
        start: float = 0.2
        stop: float = 0.8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from interval_problems("start", self.start, "stop", self.stop)

        def active(self, passes: tuple[Pass, ...], step: int, steps: int) -> tuple[Pass, ...]:
            return passes if is_within(step, steps, self.start, self.stop) else passes[:1]

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        return rescale_std(
            uncond + self.cfg.guidance_scale * (full - uncond), full, self.cfg.guidance_rescale
        )
