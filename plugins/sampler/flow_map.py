"""Sampling with the average velocity of each step (2505.13447, eq. 12; 2410.12557, alg. 2)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig
from sandbox.registry import register


@register("sampler", "flow_map")
class FlowMap(Solver):
    """One or a few steps of a network that knows the size of its step; `steps` model calls.

    For method=mean_flow and method=shortcut. A step is that of euler, with the average velocity
    over the step in place of the velocity at its start.
    """

    @dataclass
    class Config(SamplerConfig):
        steps: int = 1

        def scalars(self) -> tuple[str, ...]:
            return ("step_size",)

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        ends = [*run.times[1:], run.times.new_zeros(())]
        for step, _, (alpha, sigma) in run:
            z, d = run.denoised(z, step, step, step_size=run.times[step] - ends[step])
            z = alpha * d.z0 + sigma * d.eps  # z_r = z_t - (t - r) u
        return z
