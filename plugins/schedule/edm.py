"""The preconditioning and noise distribution of EDM (Karras et al. 2022, 2206.00364, table 1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plugins._blocks.diffusion import LAST, Continuous, per_sample
from sandbox.contracts import Denoised, Draws, ScheduleConfig, above, in_range, one_of
from sandbox.registry import register

T_DRAWS = ("stratified", "independent")
SPACINGS = ("trailing",)


@register("schedule", "edm")
class EDM(Continuous):
    """EDM: x = z0 + s eps with lognormal noise levels s; predicts (z0 - c_skip x) / c_out.

    z_t = x / sqrt(1 + s^2), so that alpha^2 + sigma^2 = 1, every sampler starts from standard
    normal noise, and s = sigma / alpha. t in [0, 1] is even in s^(1 / rho) between the lowest and
    the highest s (eq. 5).
    """

    @dataclass
    class Config(ScheduleConfig):
        """The noise levels are relative to the latents, whose standard deviation is sigma_data.

        sigma_min, sigma_max: lowest and highest noise level; sampling goes from the highest through
        the lowest to clean latents. mean, std: of ln(s) in training, cut to that range. rho: higher
        values make shorter steps near the lowest level. The defaults of the levels are the
        published ones, for sigma_data = 0.5, doubled, as latents have a standard deviation near 1;
        mean=-0.5 is the published mean for such latents. The default favours noisy levels, as that
        of schedule=flow does: frames of a clip are similar.
        """

        kind: ClassVar[str] = "continuous"
        may_differ: ClassVar[tuple[str, ...]] = ("mean", "std", "t_draw", "rho")

        sigma_min: float = 0.004
        sigma_max: float = 160.0
        sigma_data: float = 1.0
        rho: float = 7.0
        mean: float = 1.0
        std: float = 1.2
        t_draw: str = "stratified"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("sigma_min", self.sigma_min, 0, 1e6)
            if not self.sigma_min < self.sigma_max <= 1e6:
                yield f"sigma_max={self.sigma_max}: want > sigma_min={self.sigma_min} and <= 1e6"
            yield from above("sigma_data", self.sigma_data, 0, 1e6)
            yield from in_range("rho", self.rho, 1, 100)
            yield from in_range("mean", self.mean, -20, 20)
            yield from above("std", self.std, 0, 10)
            yield from one_of("t_draw", self.t_draw, T_DRAWS)

        def predicts(self) -> str:
            return "edm"

        def takes_frame_times(self) -> bool:
            return True

        def finds_times(self) -> bool:
            return True

        def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
            yield from one_of("spacing", spacing, SPACINGS)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.ends = cfg.sigma_min ** (1 / cfg.rho), cfg.sigma_max ** (1 / cfg.rho)

    # noise levels

    def level(self, t: Tensor) -> Tensor:
        """s at t in [0, 1]; same shape."""
        low, high = self.ends
        return (low + t * (high - low)) ** self.cfg.rho

    def time_of(self, level: Tensor) -> Tensor:
        """t of noise levels s = sigma / alpha, cut to [0, 1]; same shape."""
        low, high = self.ends
        return ((level ** (1 / self.cfg.rho) - low) / (high - low)).clamp(0, 1)

    def alpha(self, t: Tensor) -> Tensor:
        return per_sample((1 + self.level(t).square()).rsqrt())

    def sigma(self, t: Tensor) -> Tensor:
        level = self.level(t)
        return per_sample(level * (1 + level.square()).rsqrt())

    def snr(self, t: Tensor) -> Tensor:
        return per_sample(self.level(t) ** -2)

    # preconditioning, for x = z_t / alpha

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in at t, each (B, 1, 1, 1, 1)."""
        level, data = per_sample(self.level(t)), self.cfg.sigma_data
        width = (level.square() + data**2).sqrt()
        return (data / width).square(), level * data / width, 1 / width

    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x, and c_noise = ln(s) / 4 moved linearly from the range of s to [0, 1000)."""
        _, _, c_in = self.scalings(t)
        low, high = math.log(self.cfg.sigma_min), math.log(self.cfg.sigma_max)
        time = 1000 * (self.level(t).log() - low) / (high - low)
        return (c_in / self.alpha(t) * z_t).to(z_t.dtype), time.clamp(0, LAST)

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out, _ = self.scalings(t)
        # (z0 - c_skip x) / c_out (eq. 8) without the difference of nearly equal numbers
        of_eps = c_skip * per_sample(self.level(t)) / c_out
        return c_out / self.cfg.sigma_data**2 * z0 - of_eps * eps

    def denoised(self, out: Tensor, z_t: Tensor, t: Tensor) -> Denoised:
        c_skip, c_out, _ = self.scalings(t)
        x, level = z_t / self.alpha(t), per_sample(self.level(t))
        z0 = c_skip * x + c_out * out  # eq. 7
        # (x - z0) / s, which is rounded badly at low s
        eps = c_out**2 / self.cfg.sigma_data**2 / level * x - c_out / level * out
        return Denoised(z0, eps)

    # training and sampling

    def draw_t(self, draws: Draws) -> Tensor:
        """(B,) float32 in [0, 1], from ln(s) ~ N(mean, std^2).

        The loss weight of table 1 times c_out^2 is 1, so that `weight` is 1 for every t.
        """
        u = draws.stratified("t") if self.cfg.t_draw == "stratified" else draws.uniform("t")
        normal = torch.special.ndtri(u.clamp_min(2**-25))  # u may be 0
        return self.time_of((self.cfg.mean + self.cfg.std * normal).exp())

    def times(self, steps: int, spacing: str) -> Tensor:
        """(steps,) float32 from 1 to 0, the highest to the lowest noise level (eq. 5).

        One step starts at the highest. Raises ValueError for invalid `steps` or `spacing`.
        """
        self.even(1.0, steps, spacing)  # checks both
        return torch.linspace(1, 0, steps, dtype=torch.float64, device="cpu").float()
