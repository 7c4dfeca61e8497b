"""Heun's method for the probability-flow ODE (Karras et al. 2022, 2206.00364, algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig
from sandbox.registry import register


@register("sampler", "heun")
class Heun(Solver):
    """Heun: second order, deterministic; 2 * steps - 1 model calls.

    The trapezoidal rule is applied in coordinates where every schedule is a rectified flow: with
    c = alpha + sigma, y = z/c obeys dy/ds = eps - z0 for s = sigma/c. This is finite at pure noise,
    where sigma/alpha is infinite.
    """

    @dataclass
    class Config(SamplerConfig):
        pass

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        for step, (alpha, sigma), (alpha_next, sigma_next) in run:
            z, d = run.denoised(z, step, step)
            z = alpha_next * d.z0 + sigma_next * d.eps
            if sigma_next:  # the last step is an Euler step: no noise is left
                z, d_next = run.denoised(z, step + 1, step)
                scale = alpha_next + sigma_next
                stride = sigma_next / scale - sigma / (alpha + sigma)
                change = (d_next.eps - d_next.z0) - (d.eps - d.z0)
                z = z + scale * stride / 2 * change
        return z
