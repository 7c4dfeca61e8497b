"""Cycles of linear warm-up and cosine (CompVis latent-diffusion, LambdaWarmUpCosineScheduler2).

One cycle is its LambdaWarmUpCosineScheduler.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import LRScheduleConfig, above, in_range, same_length
from sandbox.registry import register


@register("lr_schedule", "lambda_warmup_cosine")
class LambdaWarmupCosine:
    """CompVis latent-diffusion's cycles: linear warm-up, then half a cosine down."""

    @dataclass
    class Config(LRScheduleConfig):
        """One entry a cycle: length and warm-up in steps; factors at start, top and end.

        After the last cycle the last factor stays.
        """

        warm_up_steps: tuple[int, ...] = (50,)
        f_start: tuple[float, ...] = (1e-6,)
        f_max: tuple[float, ...] = (1.0,)
        f_min: tuple[float, ...] = (0.01,)
        cycle_lengths: tuple[int, ...] = (1200,)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("cycle_lengths", len(self.cycle_lengths), 0)
            for name in ("warm_up_steps", "f_start", "f_max", "f_min"):
                yield from same_length(name, getattr(self, name), len(self.cycle_lengths), "cycle")
                for i, value in enumerate(getattr(self, name)):
                    yield from in_range(f"{name}[{i}]", value, 0, 1e300)
            for i, length in enumerate(self.cycle_lengths):
                yield from above(f"cycle_lengths[{i}]", length, 0)
            for i, (warm_up, length) in enumerate(
                zip(self.warm_up_steps, self.cycle_lengths, strict=False)
            ):
                if warm_up >= length:
                    yield f"warm_up_steps[{i}]={warm_up}: want < cycle_lengths[{i}]={length}"

        def factor(self, step: int, steps: int) -> float:
            start = 0
            for i, length in enumerate(self.cycle_lengths):
                if step <= start + length or i == len(self.cycle_lengths) - 1:
                    return self._within(i, min(step - start, length))
                start += (
                    length  # as published: a cycle's last step belongs to it, not to the next one
                )
            raise AssertionError("problems() asks for a cycle")

        def _within(self, i: int, n: int) -> float:
            """Factor at step `n` of cycle `i`."""
            warm_up, low, high = self.warm_up_steps[i], self.f_min[i], self.f_max[i]
            if n < warm_up:
                return self.f_start[i] + (high - self.f_start[i]) / warm_up * n
            done = (n - warm_up) / (self.cycle_lengths[i] - warm_up)
            return low + (high - low) * (1 + math.cos(math.pi * done)) / 2

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
