"""PNDM without the Runge-Kutta start (Liu et al. 2022, 2202.09778); LDM calls it PLMS."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig, ScheduleConfig
from sandbox.registry import register

# Adams-Bashforth weights of the noise estimates, newest first, by their number.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
LEAST_SIGNAL = 1e-3  # below this alpha, z0 amplifies a change of the noise too much


@register("sampler", "pndm")
class PNDM(Solver):
    """PNDM (PLMS): linear multistep in the noise, deterministic; `steps` + 1 model calls.

    The first step is taken twice: as DDIM, then with the mean of the noise at both ends. From pure
    noise it is a DDIM step.
    """

    @dataclass
    class Config(SamplerConfig):
        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "pndm: needs integer times; want schedule=ddpm, or sampler=dpmpp_2m"
                return
            yield from super().accepts(schedule)

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        noises: list[Tensor] = []  # newest first
        for step, (alpha, sigma), (alpha_next, sigma_next) in run:
            z, d = run.denoised(z, step, step)
            noises = [d.eps, *noises[:3]]
            eps = sum(w * e for w, e in zip(WEIGHTS[len(noises) - 1], noises, strict=True))
            if alpha < LEAST_SIGNAL:
                z = alpha_next * d.z0 + sigma_next * d.eps
                continue
            if step == 0 and sigma_next:
                _, ahead = run.denoised(alpha_next * d.z0 + sigma_next * d.eps, 1, 0)
                eps = (d.eps + ahead.eps) / 2
            z0 = d.z0 + sigma / alpha * (d.eps - eps)
            z = alpha_next * z0 + sigma_next * eps
        return z
