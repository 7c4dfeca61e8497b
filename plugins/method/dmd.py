"""Distribution matching distillation to a few steps (DMD2, Yin et al. 2024, 2405.14867)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.diffusion import Renamed
from plugins._blocks.distillation import guided
from sandbox.contracts import (
    FROZEN,
    TRAINED,
    Draws,
    Example,
    MethodConfig,
    Model,
    Role,
    SamplerConfig,
    Terms,
    above,
    in_range,
)
from sandbox.registry import register

TEACHER, CRITIC = "teacher", "critic"


@register("method", "dmd")
class DMD:
    """A generator of a few steps, whose samples a teacher scores against a critic of the generator.

    No regression and no adversarial loss. The critic, a denoiser of the generator's samples, has
    several updates for each of the generator (section 4.2). Sample with sampler=lcm and
    guidance=none.
    """

    @dataclass
    class Config(MethodConfig):
        """teacher: run folder of the teacher, or weights of one of the same sizes.

        A run has the first stage and the schedule of this one; its EMA weights are used. Start the
        generator from them, too: init_from=TEACHER. guidance_scale: of the teacher.
        generator_steps: steps of the generator, and of the sampler. turns: updates of the critic
        for each of the generator; critic_lr: factor of its learning rate.
        """

        teacher: str | None = None
        guidance_scale: float = 2.0
        generator_steps: int = 4
        turns: int = 5
        critic_lr: float = 1.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
            yield from in_range("generator_steps", self.generator_steps, 1, 16)
            yield from in_range("turns", self.turns, 1, 100)
            yield from above("critic_lr", self.critic_lr, 0, 1000)

        def files(self) -> dict[str, str | None]:
            return {"teacher": self.teacher}

        def roles(self) -> Mapping[str, Role]:
            return {
                TEACHER: Role(FROZEN, self.teacher, "method.teacher"),
                CRITIC: Role(TRAINED, start=TEACHER, turns=self.turns, lr=self.critic_lr),
            }

        def learns_guidance(self) -> bool:
            return self.guidance_scale != 1

        def accepts_sampler(self, sampler: SamplerConfig) -> Iterator[str]:
            if sampler.plugin != "sampler/lcm":
                yield "its generator adds new noise in each step: use sampler=lcm"
            elif sampler.steps != self.generator_steps:
                yield (
                    f"its generator has method.generator_steps={self.generator_steps}, and "
                    f"sampler.steps={sampler.steps}: use one number for both"
                )

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        x = self.generated(model, example, draws)
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", x)
        x_t = model.schedule.noised(x.detach(), eps, t)
        real = guided(model, example, x_t, t, TEACHER, self.cfg.guidance_scale).z0
        fake = guided(model, example, x_t, t, CRITIC, 1).z0
        # The gradient of the Kullback-Leibler divergence, equation 3, normalised as in DMD
        # (2311.18828, equation 8). The loss has this gradient with respect to x.
        size = (x.detach() - real).abs().flatten(1).mean(1).clamp_min(1e-6)
        target = x.detach() - (fake - real) / size.view(-1, 1, 1, 1, 1)
        per_sample = 0.5 * (x - target).square().flatten(1).mean(1)
        return Terms(per_sample.mean(), per_sample.detach())

    def update(self, role: str, turn: int, model: Model, example: Example, draws: Draws) -> Terms:
        """Denoising of the generator's samples, by the critic (equation 6 of DMD)."""
        draws = Renamed(draws, f"_{role}_{turn}")
        with torch.no_grad():
            x = self.generated(model, example, draws)
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", x)
        x_t = model.schedule.noised(x, eps, t)
        out = model(x_t, t, example.conditions(frozenset(), role), role=role)
        return model.loss(model.schedule, out.raw, x, eps, t)

    def generated(self, model: Model, example: Example, draws: Draws) -> Tensor:
        """Samples (B, C, T, H, W) after one to all steps; the last has gradients (section 4.4).

        The number of steps is the same for all clips of an optimizer step, and the steps before
        the last are those of sampling.
        """
        schedule, cond = model.schedule, example.conditions(frozenset())
        count = self.cfg.generator_steps
        times = schedule.times(count, "trailing").to(example.z0.device)
        last = int(draws.shared("step").integers("generator_steps", 0, count)[0])
        z = draws.normal("generator_start", example.z0)
        z = schedule.sigma(times[:1]).to(z) * z

        def clean(z: Tensor, step: int) -> Tensor:
            t = times[step].expand(len(z))
            return schedule.denoised(model(z, t, cond).raw, z, t).z0.to(z.dtype)

        with torch.no_grad():
            for step in range(last):
                eps = draws.normal(f"generator_noise_{step}", z)
                z = schedule.noised(clean(z, step), eps, times[step + 1].expand(len(z)))
        return clean(z, last)
