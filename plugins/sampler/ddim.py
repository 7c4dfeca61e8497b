"""DDIM (Song et al. 2021, 2010.02502, eq. 12) with the variants of LDM and CogVideoX."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins._blocks.diffusion import (
    CLEAN,
    Level,
    Solver,
    Trajectory,
    levels,
    snrs,
    stride_landings,
)
from sandbox.contracts import (
    ConfigError,
    Draws,
    SamplerConfig,
    Schedule,
    ScheduleConfig,
    in_range,
    one_of,
)
from sandbox.registry import register

ENDS = ("clean", "first")
LANDINGS = ("next", "stride")


@register("sampler", "ddim")
class DDIM(Solver):
    """DDIM: first order, deterministic (eta 0) to ancestral (eta 1); `steps` model calls."""

    @dataclass
    class Config(SamplerConfig):
        """eta: share of fresh noise per step; temperature: factor of that noise.

        end: the last step ends at "clean" latents, or at the noise level of the "first" time of the
        schedule (LDM, DynamiCrafter).
        landing: a step ends at the time of the "next" model call, or a fixed "stride" earlier
        (CogVideoX), which also determines the end.
        """

        eta: float = 0.0
        temperature: float = 1.0
        end: str = "clean"
        landing: str = "next"

        def recombines(self) -> bool:
            return True

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("eta", self.eta, 0, 1)
            yield from in_range("temperature", self.temperature, 0, 100)
            yield from one_of("end", self.end, ENDS)
            yield from one_of("landing", self.landing, LANDINGS)
            if self.landing == "stride" and self.spacing != "trailing":
                yield f"landing='stride': want spacing=trailing, not {self.spacing}"
            if self.landing == "stride" and self.end != "clean":
                yield f"end={self.end!r}: landing=stride determines the end; want 'clean'"

        def diffusers_config(self) -> dict[str, Any]:
            if self.landing != "stride" or self.eta:
                raise ConfigError(
                    f"landing={self.landing!r} and eta={self.eta}: that of CogVideoX in diffusers "
                    "has 'stride' and 0; use sampler.landing=stride sampler.eta=0"
                )
            return {"_class_name": "CogVideoXDDIMScheduler", "timestep_spacing": self.spacing}

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            yield from super().accepts(schedule)
            if schedule.kind != "discrete":
                if self.end != "clean":
                    yield f"end={self.end!r}: the schedule is continuous; want 'clean'"
                if self.landing != "next":
                    yield f"landing={self.landing!r}: the schedule is continuous; want 'next'"

    cfg: Config

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        times = run.times.cpu()
        snr = snrs(run.schedule, times)
        for step, ((alpha, sigma), snr_next) in enumerate(self._landings(run, times)):
            z, d = run.denoised(z, step, step)
            # eq. 16
            noise = self.cfg.eta * sigma * (1 - snr[step] / snr_next) ** 0.5 if sigma else 0.0
            z = alpha * d.z0 + (sigma**2 - noise**2) ** 0.5 * d.eps
            if noise:
                z = z + noise * self.cfg.temperature * draws.normal(f"sampler_noise_{step}", z)
        return z

    def _landings(self, run: Trajectory, times: Tensor) -> list[tuple[Level, float]]:
        """The level at the end of each step, with its signal-to-noise ratio."""
        schedule = run.schedule
        last = CLEAN, float("inf")
        if self.cfg.landing == "stride":
            landings = torch.tensor(stride_landings(times))
            known = landings.clamp_min(0)
            found = zip(levels(schedule, known), snrs(schedule, known), strict=True)
            return [f if t >= 0 else last for t, f in zip(landings, found, strict=True)]
        if self.cfg.end == "first":
            first = torch.zeros_like(times[:1])
            ((alpha, sigma),), (snr,) = levels(schedule, first), snrs(schedule, first)
            last = (alpha * self._rescale(schedule, times[-1:]), sigma), snr
        return [*zip(run.levels[1:-1], snrs(schedule, times[1:]), strict=True), last]

    @staticmethod
    def _rescale(schedule: Schedule, t: Tensor) -> float:
        """The published rescaling of z0 at t; 1 without one, or if t is pure noise.

        As published: the last step keeps the rescaling of the last model call. A cleaner version
        would not rescale there.
        """
        ((alpha, sigma),), (snr,) = levels(schedule, t), snrs(schedule, t)
        return alpha / (sigma * snr**0.5) if snr else 1.0
