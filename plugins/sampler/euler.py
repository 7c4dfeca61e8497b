"""Euler's method for the probability-flow ODE."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig
from sandbox.registry import register


@register("sampler", "euler")
class Euler(Solver):
    """Euler: first order, deterministic; `steps` model calls.

    A step recombines the estimates of z0 and eps at the next level: for a rectified flow the usual
    z += (t' - t) velocity, for a diffusion schedule DDIM with eta 0.
    """

    @dataclass
    class Config(SamplerConfig):
        def recombines(self) -> bool:
            return True

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        for step, _, (alpha, sigma) in run:
            z, d = run.denoised(z, step, step)
            z = alpha * d.z0 + sigma * d.eps
        return z
