"""What schedules, samplers and guidance share: tables, noise levels, the model along a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sandbox.contracts import Denoised, Hooks, Schedule

Model = Callable[[Tensor, Tensor, int], Tensor]
Level = tuple[float, float]  # (alpha, sigma)

CLEAN: Level = (1.0, 0.0)


def per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1), to be multiplied with latents."""
    return values.view(-1, 1, 1, 1, 1)


LAST = 999.9999  # backbones are promised times below 1000


class Continuous(ABC):
    """What schedules of a time in [0, 1] share.

    A subclass gives `alpha`, `sigma`, `target` and `denoised`, and its `spacings`.
    """

    spacings: ClassVar[tuple[str, ...]] = ("trailing",)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Of the latents. (B, 1, 1, 1, 1)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Of the noise. (B, 1, 1, 1, 1)."""

    def snr(self, t: Tensor) -> Tensor:
        """(alpha / sigma)^2, infinite where there is no noise. (B, 1, 1, 1, 1)."""
        return (self.alpha(t) / self.sigma(t)).square()

    def noised(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (self.alpha(t) * z0 + self.sigma(t) * eps).to(z0.dtype)

    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the backbone gets; it counts times to 1000."""
        return z_t, (t * 1000).clamp_max(LAST)

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def even(self, first: float, steps: int, spacing: str) -> Tensor:
        """(steps,) float64 on the CPU, evenly down from `first`; 0 would come next.

        Raises ValueError for what cannot be spaced.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: want at least 1")
        if spacing not in self.spacings:
            raise ValueError(f"spacing={spacing!r}: want one of {list(self.spacings)}")
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]


class Table:
    """A constant of each discrete time: float64 values, looked up as float32.

    It holds a copy for each device that asks. Copies are never inference tensors, so a table that
    sampling used first still serves training.
    """

    def __init__(self, values: np.ndarray) -> None:
        with torch.inference_mode(False):
            self._copies = {torch.device("cpu"): torch.from_numpy(values.astype(np.float32))}

    def __call__(self, t: Tensor) -> Tensor:
        """(B,) integers -> (B,) float32. Raises IndexError for a time that is not there."""
        if t.device not in self._copies:
            with torch.inference_mode(False):
                self._copies[t.device] = self._copies[torch.device("cpu")].to(t.device)
        return self._copies[t.device][t]


def levels(schedule: Schedule, times: Tensor) -> list[Level]:
    """(alpha, sigma) at each of `times` (N,).

    Plain numbers: a step's coefficients are computed in float64 on every device, and cost no
    synchronisation.
    """
    return list(zip(_numbers(schedule.alpha(times)), _numbers(schedule.sigma(times)), strict=True))


def ratios(schedule: Schedule, times: Tensor) -> list[float]:
    """Signal-to-noise ratio at each of `times` (N,)."""
    return _numbers(schedule.snr(times))


def _numbers(values: Tensor) -> list[float]:
    return values.flatten().tolist()


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma): -inf for pure noise, inf for clean latents."""
    alpha, sigma = level
    if not alpha or not sigma:
        return -math.inf if sigma else math.inf
    return math.log(alpha / sigma)


def earlier(times: Tensor) -> list[int]:
    """Where steps land in CogVideoX: t - T // N for N trailing times; below 0 is clean latents.

    As published: where N does not divide T this is not the time of the next call. The cleaner rule
    lands there.
    """
    timesteps = int(times[0]) + 1  # trailing times start at T - 1
    return [int(t) - timesteps // len(times) for t in times]


class Trajectory:
    """One sampling run: its times, their noise levels, and what the model says there.

    The state `z` is float32 or wider; the model gets the dtype that the run was started with.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        z: Tensor,
        steps: int,
        spacing: str,
        hooks: Hooks | None,
    ) -> None:
        self.model, self.schedule, self.hooks = model, schedule, hooks
        self.dtype = z.dtype
        self.start = z.to(torch.promote_types(z.dtype, torch.float32))
        times = schedule.times(steps, spacing).cpu()
        self.levels = [*levels(schedule, times), CLEAN]  # one more than there are times
        self.times = times.to(z.device)

    def __iter__(self) -> Iterator[tuple[int, Level, Level]]:
        """(step, level before, level after); the last step lands on clean latents."""
        for step in range(len(self.times)):
            yield step, self.levels[step], self.levels[step + 1]

    def denoised(self, z: Tensor, place: int, step: int) -> tuple[Tensor, Denoised]:
        """One call of the model at the time number `place`; z comes back as the hooks left it."""
        t = self.times[place].expand(len(z))
        if self.hooks:
            z = self.hooks.before(z, t)
        d = self.schedule.denoised(self.model(z.to(self.dtype), t, step), z, t)
        return z, self.hooks.denoised(d, t) if self.hooks else d

    def end(self, z: Tensor) -> Tensor:
        return z.to(self.dtype)


def rescaled(guided: Tensor, full: Tensor, amount: float) -> Tensor:
    """`guided` with a deviation nearer to that of `full` (Lin et al. 2023, eq. 15 and 16)."""
    if not amount:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = full.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (amount * factor + (1 - amount))
