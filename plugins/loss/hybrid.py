"""Error of the prediction plus the variational bound that trains the variance (L_hybrid).

Nichol & Dhariwal 2021 (2102.09672), section 3.1, as PixArt and EasyAnimate train it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import per_sample
from sandbox.contracts import LossConfig, Schedule, ScheduleConfig, Terms, in_range
from sandbox.registry import register

BIN = 1 / 255  # half the distance of two of 256 values in [-1, 1]


@register("loss", "hybrid")
class Hybrid:
    """Squared error plus the bound of each step in bits, whose mean part is not trained by it."""

    @dataclass
    class Config(LossConfig):
        """vb_weight: of the bound of one step. As published 1, whatever the number of times; null
        is timesteps / 1000, the share 0.001 of the whole bound that eq. 16 wants, which is the
        same at 1000 times. x0_below: times below it train the error of z0 in place of the
        prediction's; 250 is EasyAnimate's `snr_loss`, 0 is off.
        """

        vb_weight: float | None = 1.0
        x0_below: int = 0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("vb_weight", self.vb_weight, 0, 1e6)
            yield from in_range("x0_below", self.x0_below, 0)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "hybrid: needs a schedule with whole times; want schedule=ddpm, or loss=mse"
            elif schedule.outputs() != 2:
                yield (
                    "hybrid: trains a variance; want schedule.learned_variance=true, or loss=mse"
                )

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, schedule: Schedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms:
        out, z0, eps = out.float(), z0.float(), eps.float()
        z_t = schedule.noised(z0, eps, t)
        prediction, share = out.chunk(2, 1)
        error = mean_square(prediction - schedule.target(z0, eps, t))
        if self.cfg.x0_below:
            of_z0 = mean_square(schedule.denoised(out, z_t, t).z0 - z0)
            error = torch.where(t < self.cfg.x0_below, of_z0, error)
        error = schedule.weight(t) * error
        bound = self.bound(schedule, torch.cat((prediction.detach(), share), 1), z0, z_t, t)
        weight = self.cfg.vb_weight
        if weight is None:
            weight = schedule.cfg.timesteps / 1000
        total = error + weight * bound
        log = {"mse": error.mean(), "vb": bound.mean(), "loss": total.mean()}
        return Terms(total.mean(), total, {name: value.detach() for name, value in log.items()})

    @staticmethod
    def bound(schedule: Schedule, out: Tensor, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """(B,) bits per number of one step of the variational bound (Ho et al. 2020, eq. 5)."""
        d = schedule.denoised(out, z_t, t)
        mean, log_variance = schedule.posterior(z0, z_t, t)
        guess, _ = schedule.posterior(d.z0, z_t, t)
        step = divergence(mean, log_variance, guess, d.log_variance)
        last = -binned_log_likelihood(z0, guess, d.log_variance / 2)
        return torch.where(per_sample(t) == 0, last, step).flatten(1).mean(1) / math.log(2)


def mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def divergence(mean: Tensor, log_var: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL of normal distributions, in nats for each number: from (mean, log_var) to the others."""
    apart = (mean - mean_q).square() * torch.exp(-log_var_q)
    return 0.5 * (log_var_q - log_var - 1 + torch.exp(log_var - log_var_q) + apart)


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of one of 256 values in [-1, 1], whose ends reach to infinity (Ho et al. 2020, eq. 13).

    As published, also of latents, which have no such values.
    """
    upper, lower = (cumulative((x - mean + half) * torch.exp(-log_std)) for half in (BIN, -BIN))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()


def cumulative(x: Tensor) -> Tensor:
    """Standard normal distribution function, approximately, as published."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
