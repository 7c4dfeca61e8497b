"""CFG-Zero*: guidance for flow matching (Fan et al. 2025, 2503.18886)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import Guided, per_sample, rescale_std
from plugins._configs.guidance import TwoPassConfig
from sandbox.contracts import ScheduleConfig, in_range
from sandbox.registry import register


@register("guidance", "cfg_zero_star")
class ZeroStar(Guided):
    """Scales the unconditional pass towards the full one, and starts with zero velocity."""

    @dataclass
    class Config(TwoPassConfig):
        """zero_init_steps: first steps with zero velocity, which leave the noise unchanged."""

        zero_init_steps: int = 1

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("zero_init_steps", self.zero_init_steps, 0, 1000)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.predicts() != "velocity":
                yield (
                    "cfg_zero_star: is defined for a predicted velocity; want schedule=flow, "
                    "or guidance=cfg"
                )

    cfg: Config

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        if len(outs) > 1 and step < self.cfg.zero_init_steps:
            return torch.zeros_like(outs[0])
        return super().combine(outs, t, step, steps)

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, uncond = outs
        a, b = full.flatten(1).float(), uncond.flatten(1).float()
        scale = per_sample((a * b).sum(1) / (b.square().sum(1) + 1e-8)).to(uncond)  # eq. 7
        uncond = scale * uncond
        return rescale_std(
            uncond + self.cfg.guidance_scale * (full - uncond), full, self.cfg.guidance_rescale
        )
