"""Sampling with consistency steps (Song et al. 2023, 2303.01469, algorithm 1)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig
from sandbox.registry import register


@register("sampler", "lcm")
class LCM(Solver):
    """Each step predicts the clean latents and adds new noise of the next level.

    For networks that predict clean latents in one to eight steps, such as those of method=dmd or
    of latent consistency models.
    """

    @dataclass
    class Config(SamplerConfig):
        steps: int = 4

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        for step, _, (alpha, sigma) in run:
            z, d = run.denoised(z, step, step)
            z = alpha * d.z0
            if sigma:
                z = z + sigma * draws.normal(f"sampler_noise_{step}", z)
        return z
