"""Linear warm-up, a constant phase, then cosine decay to a floor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import LRScheduleConfig, in_range
from sandbox.registry import register


@register("lr_schedule", "warmup_cosine")
class WarmupCosine:
    """Linear warm-up, a constant phase, then cosine decay to a floor."""

    @dataclass
    class Config(LRScheduleConfig):
        """warmup: steps; hold: end of the constant phase, as a fraction of the run; floor: final
        factor.
        """

        warmup: int = 50
        hold: float = 0.30
        floor: float = 0.02

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("warmup", self.warmup, 0)
            yield from in_range("hold", self.hold, 0, 1)
            yield from in_range("floor", self.floor, 0, 1)

        def factor(self, step: int, steps: int) -> float:
            rise = min(1.0, (step + 1) / max(self.warmup, 1))
            done = min(step / steps, 1.0)
            if done <= self.hold:
                return rise
            fall = (1 + math.cos(math.pi * (done - self.hold) / (1 - self.hold))) / 2
            # a product, since a short run can end during warm-up
            return rise * (self.floor + (1 - self.floor) * fall)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
