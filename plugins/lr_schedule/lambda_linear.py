"""Cycles of linear warm-up and linear fall (CompVis latent-diffusion, LambdaLinearScheduler)."""

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import LRScheduleConfig, above, in_range, same_length
from sandbox.registry import register


@register("lr_schedule", "lambda_linear")
class LambdaLinear:
    """CompVis latent-diffusion's cycles: linear warm-up, then a linear fall."""

    @dataclass
    class Config(LRScheduleConfig):
        """One entry a cycle: length and warm-up in steps; factors at start, top and end.

        After the last cycle the last factor stays (as published there is no factor, and the run
        stops).
        """

        warm_up_steps: tuple[int, ...] = (50,)
        f_start: tuple[float, ...] = (1e-6,)
        f_max: tuple[float, ...] = (1.0,)
        f_min: tuple[float, ...] = (1.0,)
        cycle_lengths: tuple[int, ...] = (10_000_000_000_000,)

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
            # as published: the fall is measured from the cycle's start, so the factor jumps where
            # the warm-up ends.
            return low + (high - low) * (self.cycle_lengths[i] - n) / self.cycle_lengths[i]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
