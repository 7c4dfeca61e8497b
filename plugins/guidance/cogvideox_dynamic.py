"""The dynamic classifier-free guidance of CogVideoX's samplers, advised with sampler=cogvideox_dpm.

As published in code: the scale goes up and down between 1 and 1 + guidance_scale with the raw time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sandbox.contracts import GuidanceConfig, ScheduleConfig, in_range
from sandbox.registry import register


@register("guidance", "cogvideox_dynamic")
class CogVideoXDynamic:
    """Classifier-free guidance whose scale depends on the time, from 1 to 1 + guidance_scale."""

    @dataclass
    class Config(GuidanceConfig):
        """guidance_scale: 0 is the model as it is, in one pass."""

        guidance_scale: float = 6.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "cogvideox_dynamic: needs whole times; want schedule=ddpm, or guidance=cfg"

        def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
            if not signals or self.guidance_scale == 0:
                return (frozenset(),)
            return (frozenset(), frozenset(signals))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
        return self.cfg.passes(signals)

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        """outs in the order of `passes`, each (B, C, T, H, W)."""
        if len(outs) == 1:
            return outs[0]
        full, uncond = outs
        scale = self.scale(t, steps).to(full).view(-1, 1, 1, 1, 1)
        return uncond + scale * (full - uncond)

    def scale(self, t: Tensor, steps: int) -> Tensor:
        """(B,) float64 for whole times t (B,).

        As published: (steps - t) / steps is far below 0 for most times, where the cosine turns many
        times from step to step; a share of the way would stay within 0 to 1.
        """
        way = (steps - t.cpu().double()) / steps
        return 1 + self.cfg.guidance_scale * (1 - torch.cos(torch.pi * way**5)) / 2
