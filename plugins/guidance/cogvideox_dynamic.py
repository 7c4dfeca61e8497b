"""Dynamic classifier-free guidance of CogVideoX's samplers, recommended with cogvideox_dpm.

As published in code: the scale oscillates between 1 and 1 + guidance_scale with the raw time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import Guided
from sandbox.contracts import FULL, GuidanceConfig, Pass, ScheduleConfig, in_range
from sandbox.registry import register


@register("guidance", "cogvideox_dynamic")
class CogVideoXDynamic(Guided):
    """Classifier-free guidance with a time-dependent scale in [1, 1 + guidance_scale]."""

    @dataclass
    class Config(GuidanceConfig):
        """guidance_scale: 0 uses the conditional output alone, in one pass."""

        guidance_scale: float = 6.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "cogvideox_dynamic: needs integer times; want schedule=ddpm, or guidance=cfg"

        def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
            if not signals or self.guidance_scale == 0:
                return (FULL,)
            return (FULL, Pass(frozenset(signals)))

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        scale = self.scale(t, steps).to(full).view(-1, 1, 1, 1, 1)
        return uncond + scale * (full - uncond)

    def scale(self, t: Tensor, steps: int) -> Tensor:
        """(B,) float64 for integer times t (B,).

        As published: (steps - t) / steps is far below 0 for most times, where the cosine completes
        many periods between steps. A cleaner version would use a fraction in [0, 1].
        """
        fraction = (steps - t.cpu().double()) / steps
        return 1 + self.cfg.guidance_scale * (1 - torch.cos(torch.pi * fraction**5)) / 2
