"""Euler's method for the probability-flow ODE."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Model, Trajectory
from sandbox.contracts import Draws, Hooks, SamplerConfig, Schedule
from sandbox.registry import register


@register("sampler", "euler")
class Euler:
    """Euler: first order, deterministic; `steps` calls of the model.

    It moves along the line through the estimated z0 and eps: for a flow the usual Euler step
    z += (t' - t) velocity, for a diffusion DDIM with eta 0.
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
        for step, _, (alpha, sigma) in run:
            z, d = run.denoised(z, step, step)
            z = alpha * d.z0 + sigma * d.eps
        return run.end(z)
