"""Config of CompVis latent-diffusion's cyclic learning-rate schedules."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import LRScheduleConfig, above, in_range, same_length


@dataclass
class CyclesConfig(LRScheduleConfig):
    """One entry per cycle: length and warm-up in steps, and the factors of lr at start, top, end.

    After the last cycle the last factor is kept.
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
                return self.cycle_factor(i, min(step - start, length))
            start += length  # as published: a cycle's last step belongs to it, not to the next
        raise AssertionError("problems() requires at least one cycle")

    def cycle_factor(self, i: int, n: int) -> float:
        """Factor at step `n` of cycle `i`."""
        if n < self.warm_up_steps[i]:
            rise = (self.f_max[i] - self.f_start[i]) / self.warm_up_steps[i]
            return self.f_start[i] + rise * n
        return self.f_min[i] + (self.f_max[i] - self.f_min[i]) * self.decay(i, n)

    @abstractmethod
    def decay(self, i: int, n: int) -> float:
        """Fraction of the way from `f_min` to `f_max` at step `n` of cycle `i`, after warm-up."""
