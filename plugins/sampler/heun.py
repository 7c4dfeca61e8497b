"""Heun's method for the probability-flow ODE (Karras et al. 2022, 2206.00364, algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Model, Trajectory
from sandbox.contracts import Draws, Hooks, SamplerConfig, Schedule
from sandbox.registry import register


@register("sampler", "heun")
class Heun:
    """Heun: second order, deterministic; 2 * steps - 1 calls of the model.

    The trapezoid is taken where every schedule is a rectified flow: with c = alpha + sigma, y = z/c
    obeys dy/ds = eps - z0 for s = sigma/c, also at pure noise, where sigma/alpha is infinite.
    """

    @dataclass
    class Config(SamplerConfig):
        """No settings of its own."""

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
        for step, (alpha, sigma), (alpha_next, sigma_next) in run:
            z, d = run.denoised(z, step, step)
            z = alpha_next * d.z0 + sigma_next * d.eps
            if sigma_next:  # the last step stays an Euler step: there is no noise left to look at
                z, d_next = run.denoised(z, step + 1, step)
                scale = alpha_next + sigma_next
                stride = sigma_next / scale - sigma / (alpha + sigma)
                bend = (d_next.eps - d_next.z0) - (d.eps - d.z0)
                z = z + scale * stride / 2 * bend
        return run.end(z)
