"""MeanFlow: the average velocity of a step (Geng et al. 2025, 2505.13447)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.average_velocity import average_velocity, derivative, squared_error, terms
from plugins._blocks.diffusion import Renamed
from plugins._configs.average_velocity import AverageVelocityConfig
from sandbox.contracts import Draws, Example, Model, Terms, above, in_range
from sandbox.registry import register


@register("method", "mean_flow")
class MeanFlow:
    """Learns u(z_t, r, t), the mean of the velocity from t to r, for sampling in one or few steps.

    Sample with sampler=flow_map. Other samplers use r = t, where u is the velocity of the flow.
    """

    @dataclass
    class Config(AverageVelocityConfig):
        """unequal: share of clips with r < t; the others train the velocity, as denoising does.

        The schedule gives the distribution of both times; in the paper, the logit-normal one with
        schedule.mean=-0.4. Clips with r = t have a time of it, the others the larger of two.

        adaptive_power, adaptive_offset: p and c of the weight (error + c)^-p, for the mean squared
        error of a clip (section 4.3; the paper sums over elements). p = 0 is the plain mean.
        guidance_scale: guidance in the target, so that one call makes a guided sample; 1: none.
        """

        unequal: float = 0.25
        adaptive_power: float = 1.0
        adaptive_offset: float = 1e-3
        guidance_scale: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("unequal", self.unequal, 0, 1)
            yield from in_range("adaptive_power", self.adaptive_power, 0, 2)
            yield from above("adaptive_offset", self.adaptive_offset, 0, 1e3)
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)

        def learns_guidance(self) -> bool:
            return self.guidance_scale != 1

        def forward_mode(self) -> bool:
            return self.unequal > 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0, cond = example.z0, example.conditions()
        t, step = self.times(model, draws)
        eps = draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        out = average_velocity(model, z_t, t, step, cond)
        target = self.velocity(model, example, z_t, eps, t)
        if self.cfg.unequal:
            du = derivative(model, z_t, t, step, cond, target)
            target = target - step.view(-1, 1, 1, 1, 1) * du  # eq. 10 and 11; with guidance, 18
        error = squared_error(out, target)
        if not self.cfg.adaptive_power:
            return terms(error)
        weight = (error.detach() + self.cfg.adaptive_offset) ** -self.cfg.adaptive_power
        return terms(error, weight)

    def times(self, model: Model, draws: Draws) -> tuple[Tensor, Tensor]:
        """t and t - r, each (B,)."""
        t = model.schedule.draw_t(draws)
        if not self.cfg.unequal:
            return t, torch.zeros_like(t)
        other = model.schedule.draw_t(Renamed(draws, "_r"))
        is_unequal = draws.stratified("unequal_times") < self.cfg.unequal
        step = torch.where(is_unequal, (t - other).abs(), 0)
        return torch.where(is_unequal, torch.maximum(t, other), t), step

    def velocity(
        self, model: Model, example: Example, z_t: Tensor, eps: Tensor, t: Tensor
    ) -> Tensor:
        """The velocity at z_t, guided where the scale is not 1; float32 or float64."""
        wide = torch.promote_types(z_t.dtype, torch.float32)
        v = model.schedule.target(example.z0.to(wide), eps.to(wide), t)
        if not self.cfg.learns_guidance():
            return v
        # For clips whose conditions are dropped, the expectation of eq. 19 is the plain velocity.
        uncond, scale = example.conditions(frozenset(example.signals)), self.cfg.guidance_scale
        with torch.no_grad():
            u = average_velocity(model, z_t, t, torch.zeros_like(t), uncond).to(wide)
        return scale * v + (1 - scale) * u  # eq. 19
