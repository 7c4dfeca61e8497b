"""DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2)."""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory, log_snr
from sandbox.contracts import Draws, SamplerConfig
from sandbox.registry import register


@register("sampler", "dpmpp_2m")
class DPMpp2M(Solver):
    """DPM-Solver++(2M): second order, deterministic, multistep; `steps` model calls.

    First order in the first step, after pure noise and in the last step, where a log-SNR is
    infinite or no previous estimate exists.
    """

    @dataclass
    class Config(SamplerConfig):
        pass

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
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
        return z
