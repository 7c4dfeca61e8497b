"""The stochastic sampler of EDM (Karras et al. 2022, 2206.00364, algorithm 2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from plugins._blocks.diffusion import Level, Solver, Trajectory, levels
from sandbox.contracts import Draws, SamplerConfig, ScheduleConfig, in_range
from sandbox.registry import register

MOST_CHURN = math.sqrt(2) - 1  # relative increase of the noise level in a step


@register("sampler", "edm_heun")
class EDMHeun(Solver):
    """Heun in the coordinates of EDM, with fresh noise before each step; 2 * steps - 1 calls.

    The coordinates are x = z / alpha with the noise level s = sigma / alpha.
    """

    @dataclass
    class Config(SamplerConfig):
        """churn: amount of fresh noise over all steps (S_churn; 0 is deterministic), for noise
        levels sigma / alpha from churn_min to churn_max (S_tmin, S_tmax); noise: its standard
        deviation (S_noise), slightly above 1 to make up for a network that removes too much.
        Noise is added at most up to the highest level of the schedule.
        """

        churn: float = 0.0
        churn_min: float = 0.0
        churn_max: float = math.inf
        noise: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("churn", self.churn, 0, 1e6)
            yield from in_range("churn_min", self.churn_min, 0)
            if not self.churn_max >= self.churn_min:
                yield f"churn_max={self.churn_max}: want >= churn_min={self.churn_min}"
            yield from in_range("noise", self.noise, 0, 10)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            yield from super().accepts(schedule)
            if not schedule.finds_times():
                yield (
                    "edm_heun: needs a schedule with a time for each noise level; want "
                    "schedule=edm, or schedule=flow with t_start < 1"
                )

    cfg: Config

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        x = z / run.levels[0][0]
        for step, before, (alpha_next, sigma_next) in run:
            x, t, (alpha, sigma) = self._churned(run, x, step, before, draws)
            z, d = run.denoised_at(x * alpha, t, step)
            x, s, s_next = z / alpha, sigma / alpha, sigma_next / alpha_next
            slope = (x - d.z0) / s
            x_next = x + (s_next - s) * slope
            if s_next:  # the last step is an Euler step
                z, d = run.denoised(x_next * alpha_next, step + 1, step)
                slope_next = (z / alpha_next - d.z0) / s_next
                x_next = x + (s_next - s) / 2 * (slope + slope_next)
            x = x_next
        return x

    def _churned(
        self, run: Trajectory, x: Tensor, step: int, level: Level, draws: Draws
    ) -> tuple[Tensor, Tensor, Level]:
        """x with fresh noise, and the time () and the level that it then has."""
        cfg, s = self.cfg, level[1] / level[0]
        if not cfg.churn or not cfg.churn_min <= s <= cfg.churn_max:
            return x, run.times[step], level
        share = min(cfg.churn / len(run.times), MOST_CHURN)
        schedule = cast(Any, run.schedule)  # checked by `accepts`
        t = schedule.time_of(torch.tensor(s * (1 + share), dtype=torch.float64)).float()
        # The level of the rounded time, which is at most the highest of the schedule.
        ((alpha, sigma),) = levels(run.schedule, t[None])
        added = max((sigma / alpha) ** 2 - s**2, 0.0)
        noise = draws.normal(f"sampler_noise_{step}", x)
        return x + cfg.noise * math.sqrt(added) * noise, t.to(x.device), (alpha, sigma)
