"""DPM-Solver++(2M) as an SDE (Lu et al. 2022, 2211.01095), the sampler of CogVideoX-5b."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins._blocks.diffusion import (
    CLEAN,
    Solver,
    Trajectory,
    levels,
    log_snr,
    stride_landings,
)
from sandbox.contracts import Draws, SamplerConfig, ScheduleConfig, one_of
from sandbox.registry import register


@register("sampler", "cogvideox_dpm")
class CogVideoXDPM(Solver):
    """CogVideoX-5b's sampler: second order, stochastic, multistep; `steps` model calls.

    Uses trailing times. As published: a step ends a fixed stride earlier, which differs from the
    next time if `steps` does not divide the schedule. The first step, and any step that ends at
    clean latents, is of first order.
    """

    @dataclass
    class Config(SamplerConfig):
        steps: int = 50

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("spacing", self.spacing, ["trailing"])

        def diffusers_config(self) -> dict[str, Any]:
            return {"_class_name": "CogVideoXDPMScheduler", "timestep_spacing": "trailing"}

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            yield from super().accepts(schedule)
            if schedule.kind != "discrete":
                yield "cogvideox_dpm: needs integer times; want schedule=ddpm, or sampler=dpmpp_2m"

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        landings = stride_landings(run.times)
        landing_levels = levels(run.schedule, torch.tensor(landings).clamp_min(0))
        z0_old = None
        for step, level, _ in run:
            z, d = run.denoised(z, step, step)
            level_next = landing_levels[step] if landings[step] >= 0 else CLEAN
            (_, sigma), (alpha_next, sigma_next) = level, level_next
            stride = log_snr(level_next) - log_snr(level)
            z0 = d.z0
            if z0_old is not None and sigma_next:
                stride_old = log_snr(level) - log_snr(run.levels[step - 1])
                z0 = d.z0 + stride / (2 * stride_old) * (d.z0 - z0_old)
            z0_old = d.z0
            keep, pull = sigma_next / sigma * math.exp(-stride), -math.expm1(-2 * stride)
            z = keep * z + pull * alpha_next * z0
            if sigma_next:
                z = z + sigma_next * math.sqrt(pull) * draws.normal(f"sampler_noise_{step}", z)
        return z
