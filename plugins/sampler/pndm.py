"""PNDM without a Runge-Kutta start (Liu et al. 2022, 2202.09778), which LDM calls PLMS."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Model, Trajectory
from sandbox.contracts import Draws, Hooks, SamplerConfig, Schedule, ScheduleConfig
from sandbox.registry import register

# Adams-Bashforth weights of the latest noise and those before it, by how many there are.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
LEAST_SIGNAL = 1e-3  # with less of it a change of the noise is magnified beyond use in z0


@register("sampler", "pndm")
class PNDM:
    """PNDM (PLMS): multistep in the noise, deterministic; `steps` + 1 calls of the model.

    The first step is taken twice: as DDIM, then with the mean of the noise at its two ends. From
    pure noise it is a DDIM step.
    """

    @dataclass
    class Config(SamplerConfig):
        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.kind != "discrete":
                yield "pndm: needs whole times; want schedule=ddpm, or sampler=dpmpp_2m"
                return
            yield from super().accepts(schedule)

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
        noises: list[Tensor] = []  # the latest one first
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
        return run.end(z)
