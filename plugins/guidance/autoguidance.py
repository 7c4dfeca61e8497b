"""Guidance by a weaker network (Karras et al. 2024, 2406.02507)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.diffusion import Guided, rescale_std
from sandbox.contracts import FROZEN, FULL, GuidanceConfig, Pass, Role, in_range
from sandbox.registry import register

WEAK = "weak"


@register("guidance", "autoguidance")
class Autoguidance(Guided):
    """Guidance away from a smaller or less trained network, two passes with all conditions.

    weak + guidance_scale (full - weak), equation 3. It needs no dropped conditions.
    """

    @dataclass
    class Config(GuidanceConfig):
        """weak: run folder of the weaker network, or weights of one of the same sizes.

        The run may have another size, with the same first stage and schedule; its EMA weights are
        used. guidance_scale: 1 uses the full network alone. guidance_rescale: how far the standard
        deviation is restored to that of the full pass, 0 to 1.
        """

        weak: str | None = None
        guidance_scale: float = 2.0
        guidance_rescale: float = 0.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
            yield from in_range("guidance_rescale", self.guidance_rescale, 0, 1)

        def files(self) -> dict[str, str | None]:
            return {"weak": self.weak}

        def roles(self) -> Mapping[str, Role]:
            return {WEAK: Role(FROZEN, self.weak, "guidance.weak")}

        def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
            return (FULL,) if self.guidance_scale == 1 else (FULL, Pass(role=WEAK))

    cfg: Config

    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        full, weak = outs
        guided = weak + self.cfg.guidance_scale * (full - weak)
        return rescale_std(guided, full, self.cfg.guidance_rescale)
