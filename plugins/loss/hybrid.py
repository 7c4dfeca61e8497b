"""L_hybrid: prediction error plus the variational bound that trains the variance.

Nichol & Dhariwal 2021 (2102.09672), section 3.1, as PixArt and EasyAnimate train it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from plugins._blocks.diffusion import DiscreteSchedule, per_sample
from sandbox.contracts import LossConfig, ScheduleConfig, Terms, in_range
from sandbox.registry import register

BIN = 1 / 255  # half the spacing of 256 values in [-1, 1]


@register("loss", "hybrid")
class Hybrid:
    """Squared error plus the variational bound in bits, which trains the variance only."""

    @dataclass
    class Config(LossConfig):
        """vb_weight: weight of the bound of one step; as published 1 for any number of times.

        null is timesteps / 1000: 0.001 of the full bound, as in eq. 16 (equal at 1000 times).
        x0_below: below this time the error is that of z0 instead of the prediction; 250 is
        EasyAnimate's `snr_loss`, 0 is off.
        """

        vb_weight: float | None = 1.0
        x0_below: int = 0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("vb_weight", self.vb_weight, 0, 1e6)
            yield from in_range("x0_below", self.x0_below, 0)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "hybrid: needs a schedule with integer times; want schedule=ddpm, or loss=mse"
            elif schedule.outputs() != 2:
                yield (
                    "hybrid: trains a variance; want schedule.learned_variance=true, or loss=mse"
                )

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, schedule: DiscreteSchedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms:
        out, z0, eps = out.float(), z0.float(), eps.float()
        z_t = schedule.noised(z0, eps, t)
        prediction, fraction = out.chunk(2, 1)
        error = mean_square(prediction - schedule.target(z0, eps, t))
        if self.cfg.x0_below:
            of_z0 = mean_square(schedule.denoised(out, z_t, t).z0 - z0)
            error = torch.where(t < self.cfg.x0_below, of_z0, error)
        error = schedule.weight(t) * error
        bound = self.bound(schedule, torch.cat((prediction.detach(), fraction), 1), z0, z_t, t)
        weight = self.cfg.vb_weight
        if weight is None:
            weight = schedule.cfg.timesteps / 1000
        total = error + weight * bound
        log = {"mse": error.mean(), "vb": bound.mean(), "loss": total.mean()}
        return Terms(total.mean(), total, {name: value.detach() for name, value in log.items()})

    @staticmethod
    def bound(
        schedule: DiscreteSchedule, out: Tensor, z0: Tensor, z_t: Tensor, t: Tensor
    ) -> Tensor:
        """(B,) variational bound of one step, in bits per element (Ho et al. 2020, eq. 5)."""
        d = schedule.denoised(out, z_t, t)
        mean, log_variance = schedule.posterior(z0, z_t, t)
        learned = cast(Tensor, d.log_variance)  # checked by `accepts`
        guess, _ = schedule.posterior(d.z0, z_t, t)
        step = divergence(mean, log_variance, guess, learned)
        last = -binned_log_likelihood(z0, guess, learned / 2)
        return torch.where(per_sample(t) == 0, last, step).flatten(1).mean(1) / math.log(2)


def mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def divergence(mean: Tensor, log_var: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(N(mean, log_var) || N(mean_q, log_var_q)) in nats, elementwise."""
    distance = (mean - mean_q).square() * torch.exp(-log_var_q)
    return 0.5 * (log_var_q - log_var - 1 + torch.exp(log_var - log_var_q) + distance)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-likelihood of 256 bins in [-1, 1] with open ends (Ho et al. 2020, eq. 13).

    As published: also applied to latents, which are not quantised to such bins.
    """
    upper, lower = (cumulative((x - mean + half) * torch.exp(-log_std)) for half in (BIN, -BIN))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()


def cumulative(x: Tensor) -> Tensor:
    """Approximate CDF of the standard normal, as published."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
