"""Distillation of a guided teacher (Meng et al. 2022, 2210.03142, section 3.1)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from plugins._blocks.distillation import guided
from sandbox.contracts import (
    FROZEN,
    Draws,
    Example,
    MethodConfig,
    Model,
    Role,
    Terms,
    in_range,
)
from sandbox.registry import register

TEACHER = "teacher"


@register("method", "guidance_distillation")
class GuidanceDistillation:
    """One pass learns what a teacher predicts with classifier-free guidance in two.

    Sample with guidance=none. Unlike in the paper the scale is fixed and no condition.
    """

    @dataclass
    class Config(MethodConfig):
        """teacher: run folder of the teacher, or weights of one of the same sizes.

        A run has the first stage and the schedule of this one; its EMA weights are used. Start
        from them, too: init_from=TEACHER. guidance_scale: of the teacher.
        """

        teacher: str | None = None
        guidance_scale: float = 2.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)

        def files(self) -> dict[str, str | None]:
            return {"teacher": self.teacher}

        def roles(self) -> Mapping[str, Role]:
            return {TEACHER: Role(FROZEN, self.teacher, "method.teacher")}

        def learns_guidance(self) -> bool:
            return self.guidance_scale != 1

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms:
        z0 = example.z0
        t, eps = model.schedule.draw_t(draws), draws.normal("noise", z0)
        z_t = model.schedule.noised(z0, eps, t)
        taught = guided(model, example, z_t, t, TEACHER, self.cfg.guidance_scale)
        out = model(z_t, t, example.conditions(frozenset()))
        # The loss makes its target of the clean latents and the noise that the teacher predicts.
        return model.loss(model.schedule, out.raw, taught.z0, taught.eps, t)
