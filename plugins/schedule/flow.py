"""Rectified flow (Liu et al. 2022, 2209.03003), times as in Esser et al. 2024 (2403.03206)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from plugins._blocks.diffusion import Continuous, per_sample
from sandbox.contracts import (
    Clip,
    Denoised,
    Draws,
    ScheduleConfig,
    above,
    added,
    in_range,
    one_of,
    same_length,
)
from sandbox.registry import register

T_DISTRIBUTIONS = ("logit_normal", "uniform")
T_DRAWS = ("stratified", "independent")
SPACINGS = ("trailing",)
SIZE_SHIFTS = ("none", "sqrt", "linear")


@register("schedule", "flow")
class Flow(Continuous):
    """Rectified flow, z_t = (1 - t) z0 + t eps; predicts the velocity eps - z0."""

    @dataclass
    class Config(ScheduleConfig):
        """The distribution of training times and the start of sampling.

        mean, std: of the logit of t; a positive mean favours noisy times.
        shift: multiplies t / (1 - t), in training and in sampling.
        size_shift: a further factor from the number n = T H W of latent positions, for equal
        uncertainty at all sizes: "sqrt" is sqrt(n / base_positions) (Esser et al.,
        section 5.3.2); "linear" is exp(m), with m linear in n and equal to log_shifts at
        base_positions and max_positions (Flux; a token of its paper has four positions).
        t_start: first time of sampling.
        """

        kind: ClassVar[str] = "continuous"
        may_differ: ClassVar[tuple[str, ...]] = (
            "t_distribution",
            "mean",
            "std",
            "t_draw",
            "shift",
            "size_shift",
            "base_positions",
            "max_positions",
            "log_shifts",
            "t_start",
        )

        t_distribution: str = "logit_normal"
        mean: float = 1.0
        std: float = 1.0
        t_draw: str = "stratified"
        shift: float = 1.0
        t_start: float = 0.999
        size_shift: str = added("none")
        base_positions: int = added(1024)
        max_positions: int = added(16384)
        log_shifts: tuple[float, float] = added((0.5, 1.15))

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("t_distribution", self.t_distribution, T_DISTRIBUTIONS)
            yield from in_range("mean", self.mean, -10, 10)
            yield from above("std", self.std, 0, 10)
            yield from one_of("t_draw", self.t_draw, T_DRAWS)
            yield from in_range("shift", self.shift, 0.01, 100)
            yield from above("t_start", self.t_start, 0, 1)
            yield from one_of("size_shift", self.size_shift, SIZE_SHIFTS)
            yield from in_range("base_positions", self.base_positions, 1)
            if self.size_shift == "linear" and self.max_positions <= self.base_positions:
                yield (
                    f"max_positions={self.max_positions}: want > base_positions="
                    f"{self.base_positions}"
                )
            yield from same_length("log_shifts", self.log_shifts, 2, "size")
            for i, value in enumerate(self.log_shifts):
                yield from in_range(f"log_shifts[{i}]", value, -10, 10)

        def predicts(self) -> str:
            return "velocity"

        def takes_frame_times(self) -> bool:
            return True

        def ends_in_noise(self) -> bool:
            return True

        def depends_on_size(self) -> bool:
            return self.size_shift != "none"

        def finds_times(self) -> bool:
            return self.t_start < 1  # at 1 the level is infinite

        def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
            """Problems with `times(steps, spacing)`, under the names of the sampler's settings."""
            yield from one_of("spacing", spacing, SPACINGS)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def for_size(self, grid: Clip) -> Self:
        """The schedule for latents of this size: its shift has the factor of `size_shift`."""
        cfg, positions = self.cfg, grid.frames * grid.height * grid.width
        if cfg.size_shift == "sqrt":
            factor = math.sqrt(positions / cfg.base_positions)  # eq. 23
        elif cfg.size_shift == "linear":
            low, high = cfg.log_shifts
            share = (positions - cfg.base_positions) / (cfg.max_positions - cfg.base_positions)
            factor = math.exp(low + share * (high - low))
        else:
            return self
        return type(self)(replace(cfg, shift=cfg.shift * factor, size_shift="none"))

    # training

    def draw_t(self, draws: Draws) -> Tensor:
        """(B,) float32 in [0, 1]."""
        u = draws.stratified("t") if self.cfg.t_draw == "stratified" else draws.uniform("t")
        if self.cfg.t_distribution == "logit_normal":
            normal = torch.special.ndtri(u.clamp_min(2**-25))  # u may be 0
            u = torch.sigmoid(self.cfg.mean + self.cfg.std * normal)
        return self._shifted(u)

    def alpha(self, t: Tensor) -> Tensor:
        return per_sample(1 - t)

    def sigma(self, t: Tensor) -> Tensor:
        return per_sample(t)

    def time_of(self, level: Tensor) -> Tensor:
        """t of noise levels t / (1 - t); same shape."""
        return level / (1 + level)

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - z0

    # sampling

    def denoised(self, out: Tensor, z_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(z_t - self.sigma(t) * out, z_t + self.alpha(t) * out)

    def times(self, steps: int, spacing: str) -> Tensor:
        """(steps,) float32, decreasing from `t_start` towards 0 (excluded).

        Evenly spaced before the shift. Raises ValueError for invalid `steps` or `spacing`.
        """
        return self._shifted(self.even(self.cfg.t_start, steps, spacing)).float()

    def _shifted(self, t: Tensor) -> Tensor:
        return self.cfg.shift * t / (1 + (self.cfg.shift - 1) * t)
