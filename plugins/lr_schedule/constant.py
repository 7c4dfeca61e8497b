"""A constant learning rate with optional linear warm-up."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import LRScheduleConfig, in_range
from sandbox.registry import register


@register("lr_schedule", "constant")
class Constant:
    """The peak learning rate, after `warmup` steps of linear warm-up."""

    @dataclass
    class Config(LRScheduleConfig):
        warmup: int = 0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("warmup", self.warmup, 0)

        def factor(self, step: int, steps: int) -> float:
            return min(1.0, (step + 1) / max(self.warmup, 1))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
