"""Ancestral sampling (Ho et al. 2020, 2006.11239, algorithm 2), at all times or a subset."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from plugins._blocks.diffusion import DiscreteSchedule, Level, Solver, Trajectory
from sandbox.contracts import Draws, SamplerConfig, ScheduleConfig, one_of
from sandbox.registry import register

VARIANCES = ("posterior", "beta", "learned")


@register("sampler", "ddpm")
class Ancestral(Solver):
    """Ancestral sampling from the Gaussian of each step; best with all times of the schedule."""

    @dataclass
    class Config(SamplerConfig):
        """variance: "posterior", "beta" or "learned".

        "posterior" is exact for data at one point, "beta" for standard normal data (Ho et al.,
        section 3.2); schedule.v_posterior mixes "beta" into "posterior" (LDM). "learned"
        interpolates between the two; with a subset of times these are the variances of the longer
        steps (Nichol & Dhariwal 2021, 2102.09672, section 4).
        """

        variance: str = "posterior"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("variance", self.variance, VARIANCES)

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            yield from super().accepts(schedule)
            if self.variance == "learned" and schedule.outputs() != 2:
                yield (
                    "variance='learned': the schedule has no learned variance; "
                    "want one of ['posterior', 'beta'], or schedule.learned_variance=true"
                )

    cfg: Config

    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        share = getattr(run.schedule, "v_posterior", 0.0)  # 0 unless the schedule is LDM's
        for step, level, level_next in run:
            z, d = run.denoised(z, step, step)
            keep, pull, posterior, beta = posterior_step(level, level_next)
            posterior = (1 - share) * posterior + share * beta
            z = keep * z + pull * d.z0
            if level_next[1]:  # the last step has no noise
                noise = draws.normal(f"sampler_noise_{step}", z)
                if self.cfg.variance == "learned":
                    schedule = cast(DiscreteSchedule, run.schedule)  # checked by `accepts`
                    low, high = schedule.log_variances(run.times[step : step + 1])
                    fraction = (cast(Tensor, d.log_variance) - low) / (high - low)
                    z = z + (posterior * (beta / posterior) ** fraction) ** 0.5 * noise
                else:
                    z = z + (posterior if self.cfg.variance == "posterior" else beta) ** 0.5 * noise
        return z


def posterior_step(level: Level, level_next: Level) -> tuple[float, float, float, float]:
    """(keep, pull, posterior variance, beta) of a step from t to s < t.

    q(z_s | z_t, z0) has mean keep z_t + pull z0 and the posterior variance; beta is the variance of
    q(z_t | z_s). Ho et al., eq. 6 and 7, for any alpha and sigma.
    """
    (alpha, sigma), (alpha_next, sigma_next) = level, level_next
    ratio = alpha / alpha_next
    beta = max(sigma**2 - ratio**2 * sigma_next**2, 0.0)
    share = sigma_next**2 / sigma**2
    return ratio * share, alpha_next * beta / sigma**2, beta * share, beta
