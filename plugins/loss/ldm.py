"""The loss of CompVis latent diffusion (Rombach et al. 2022) and DynamiCrafter."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plugins._blocks.diffusion import DiscreteSchedule
from sandbox.contracts import LossConfig, ScheduleConfig, Terms, in_range, one_of
from sandbox.registry import register

LOSS_TYPES = ("l2", "l1")


@register("loss", "ldm")
class LDMLoss(nn.Module):
    """The LDM loss: simple error, weighted variational bound and a log-variance per time.

    l_simple_weight (l / exp(logvar_t) + logvar_t) + original_elbo_weight elbo_weight(t) l, where l
    is the mean error of a sample. Logged under published names: `loss_simple` (the mean of l),
    `loss_vlb` and `loss`.
    """

    @dataclass
    class Config(LossConfig):
        """timesteps: length of a learned logvar; equal to the schedule's."""

        loss_type: str = "l2"
        l_simple_weight: float = 1.0
        original_elbo_weight: float = 0.0
        logvar_init: float = 0.0
        learn_logvar: bool = False
        timesteps: int = 1000

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("loss_type", self.loss_type, LOSS_TYPES)
            yield from in_range("l_simple_weight", self.l_simple_weight, 0, 1e6)
            yield from in_range("original_elbo_weight", self.original_elbo_weight, 0, 1e6)
            yield from in_range("logvar_init", self.logvar_init, -30, 30)
            yield from in_range("timesteps", self.timesteps, 1)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "ldm: needs a schedule with integer times; want schedule=ddpm, or loss=mse"
                return
            if schedule.outputs() == 2:
                yield (
                    "ldm: does not train a variance; want schedule.learned_variance=false, "
                    "or a loss with a variance bound"
                )
            timesteps: int = getattr(schedule, "timesteps", self.timesteps)
            if self.learn_logvar and self.timesteps != timesteps:
                yield f"timesteps={self.timesteps}: want {timesteps}, as the schedule has"

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.learn_logvar:
            self.logvar = nn.Parameter(torch.full((cfg.timesteps,), float(cfg.logvar_init)))

    def forward(
        self, schedule: DiscreteSchedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms:
        cfg = self.cfg
        error = out.float() - schedule.target(z0.float(), eps.float(), t)
        error = error.square() if cfg.loss_type == "l2" else error.abs()
        simple = error.flatten(1).mean(1)  # (B,)
        logvar = self.logvar[t] if cfg.learn_logvar else torch.full_like(simple, cfg.logvar_init)
        gamma = simple / logvar.exp() + logvar
        bound = schedule.elbo_weight(t) * simple
        per_sample = schedule.weight(t) * (
            cfg.l_simple_weight * gamma + cfg.original_elbo_weight * bound
        )
        total = per_sample.mean()
        log = {"loss_simple": simple.mean(), "loss_vlb": bound.mean(), "loss": total}
        if cfg.learn_logvar:
            log |= {"loss_gamma": gamma.mean(), "logvar": self.logvar.mean()}
        return Terms(total, per_sample, {name: value.detach() for name, value in log.items()})
