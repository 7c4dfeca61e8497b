"""No guidance."""

from dataclasses import dataclass

from torch import Tensor

from sandbox.contracts import FULL, GuidanceConfig, Pass
from sandbox.registry import register


@register("guidance", "none")
class NoGuidance:
    """No guidance: one pass with all conditions."""

    @dataclass
    class Config(GuidanceConfig):
        pass

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
        return (FULL,)

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        return outs[0]
