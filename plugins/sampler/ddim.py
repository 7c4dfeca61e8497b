"""DDIM (Song et al. 2021, 2010.02502, eq. 12) with the ends of LDM, DynamiCrafter and CogVideoX."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugins._blocks.diffusion import CLEAN, Level, Model, Trajectory, earlier, levels, ratios
from sandbox.contracts import (
    ConfigError,
    Draws,
    Hooks,
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
class DDIM:
    """DDIM: first order, deterministic (eta 0) to ancestral (eta 1); `steps` calls of the model."""

    @dataclass
    class Config(SamplerConfig):
        """How much noise a step adds, and where it lands.

        temperature: factor of the noise that eta adds.
        end: the last step lands on "clean" latents, or on the noise level of the "first" time (LDM,
        DynamiCrafter).
        landing: every step lands on the time of the "next" call, or a fixed "stride" earlier
        (CogVideoX), where the end follows from the stride.
        """

        eta: float = 0.0
        temperature: float = 1.0
        end: str = "clean"
        landing: str = "next"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("eta", self.eta, 0, 1)
            yield from in_range("temperature", self.temperature, 0, 100)
            yield from one_of("end", self.end, ENDS)
            yield from one_of("landing", self.landing, LANDINGS)
            if self.landing == "stride" and self.spacing != "trailing":
                yield f"landing='stride': want spacing=trailing, not {self.spacing}"
            if self.landing == "stride" and self.end != "clean":
                yield f"end={self.end!r}: landing=stride has its own end; want 'clean'"

        def released(self) -> dict[str, Any]:
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

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self,
        model: Model,
        schedule: Schedule,
        z: Tensor,
        steps: int,
        draws: Draws,
        hooks: Hooks | None = None,
    ) -> Tensor:
        run = Trajectory(model, schedule, z, steps, self.cfg.spacing, hooks)
        z = run.start
        times = run.times.cpu()
        here, there = ratios(schedule, times), self._landings(schedule, times, run.levels)
        for step, ((alpha, sigma), snr) in enumerate(there):
            z, d = run.denoised(z, step, step)
            noise = self.cfg.eta * sigma * (1 - here[step] / snr) ** 0.5 if sigma else 0.0  # eq. 16
            z = alpha * d.z0 + (sigma**2 - noise**2) ** 0.5 * d.eps
            if noise:
                z = z + noise * self.cfg.temperature * draws.normal(f"sampler_noise_{step}", z)
        return run.end(z)

    def _landings(
        self, schedule: Schedule, times: Tensor, path: list[Level]
    ) -> list[tuple[Level, float]]:
        """The level on which each step lands, with its signal-to-noise ratio."""
        if self.cfg.landing == "stride":
            places = torch.tensor(earlier(times))
            known = places.clamp_min(0)
            found = zip(levels(schedule, known), ratios(schedule, known), strict=True)
            return [
                f if p >= 0 else (CLEAN, float("inf")) for p, f in zip(places, found, strict=True)
            ]
        last = CLEAN, float("inf")
        if self.cfg.end == "first":
            first = torch.zeros_like(times[:1])
            ((alpha, sigma),), (snr,) = levels(schedule, first), ratios(schedule, first)
            last = (alpha * self._rescale(schedule, times[-1:]), sigma), snr
        return [*zip(path[1:-1], ratios(schedule, times[1:]), strict=True), last]

    @staticmethod
    def _rescale(schedule: Schedule, t: Tensor) -> float:
        """The published rescaling of z0 at t; 1 where there is none, or where t is pure noise.

        As published, the last step keeps the rescaling of the last call; a cleaner end would be
        unscaled.
        """
        ((alpha, sigma),), (snr,) = levels(schedule, t), ratios(schedule, t)
        return alpha / (sigma * snr**0.5) if snr else 1.0
