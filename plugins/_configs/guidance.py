"""Settings of guidance with a conditional and an unconditional pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import FULL, GuidanceConfig, Pass, in_range


@dataclass
class TwoPassConfig(GuidanceConfig):
    """guidance_scale: 1 uses the conditional output alone, in one pass.

    guidance_rescale: how far the standard deviation is restored to that of the full pass, 0 to 1.
    """

    guidance_scale: float = 2.0
    guidance_rescale: float = 0.0

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from in_range("guidance_scale", self.guidance_scale, 0, 1000)
        yield from in_range("guidance_rescale", self.guidance_rescale, 0, 1)

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass, ...]:
        if not signals or self.guidance_scale == 1:
            return (FULL,)
        return (FULL, Pass(frozenset(signals)))


def interval_problems(first: str, start: float, last: str, stop: float) -> Iterator[str]:
    """Problems of two settings, the start and the end of an interval of the steps."""
    yield from in_range(first, start, 0, 1)
    yield from in_range(last, stop, 0, 1)
    if 0 <= stop <= start <= 1:
        yield f"{first}={start}: want less than {last}={stop}"


def is_within(step: int, steps: int, start: float, stop: float) -> bool:
    """Whether the interval from `start` to `stop`, fractions of the steps, contains a step.

    As in diffusers: int(start * steps) <= step < int(stop * steps).
    """
    return int(start * steps) <= step < int(stop * steps)
