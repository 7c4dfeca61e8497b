"""DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Model, Trajectory, log_snr
from sandbox.contracts import Draws, Hooks, SamplerConfig, Schedule
from sandbox.registry import register


@register("sampler", "dpmpp_2m")
class DPMpp2M:
    """DPM-Solver++(2M): second order, deterministic, multistep; `steps` calls of the model.

    First order on the first step, after pure noise and on the last step: there the other estimate,
    or the end, is infinitely far in log-SNR.
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
        z0_old, stride_old = None, 0.0
        for step, level, level_next in run:
            z, d = run.denoised(z, step, step)
            stride = log_snr(level_next) - log_snr(level)
            z0 = d.z0
            if z0_old is not None and level_next[1]:
                z0 = d.z0 + stride / (2 * stride_old) * (d.z0 - z0_old)
            z0_old, stride_old = d.z0, stride
            (alpha, sigma), (alpha_next, sigma_next) = level, level_next
            z = sigma_next / sigma * z + (alpha_next - alpha * sigma_next / sigma) * z0
        return run.end(z)
