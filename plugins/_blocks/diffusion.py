"""Shared code of schedules, samplers and guidance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from sandbox.contracts import (
    Denoised,
    Draws,
    GuidanceConfig,
    Hooks,
    Pass,
    SamplerConfig,
    Schedule,
)

Model = Callable[..., Tensor]  # (z_t, t, step) and, where a sampler passes them, scalars
Level = tuple[float, float]  # (alpha, sigma)

CLEAN: Level = (1.0, 0.0)
LAST = 999.9999  # times of a backbone are below 1000


def per_sample(values: Tensor) -> Tensor:
    """Broadcasts over latents: (B,) -> (B, 1, 1, 1, 1), and (B, T) -> (B, 1, T, 1, 1)."""
    if values.ndim == 2:
        return values[:, None, :, None, None]
    return values.view(-1, 1, 1, 1, 1)


class Renamed:
    """Random draws whose names end in `suffix`: independent of those without it."""

    def __init__(self, draws: Draws, suffix: str) -> None:
        self.draws, self.suffix = draws, suffix

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self.draws.normal(name + self.suffix, like)

    def uniform(self, name: str) -> Tensor:
        return self.draws.uniform(name + self.suffix)

    def stratified(self, name: str) -> Tensor:
        return self.draws.stratified(name + self.suffix)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self.draws.integers(name + self.suffix, low, high)

    def shared(self, over: str = "micro_batch") -> Draws:
        return Renamed(self.draws.shared(over), self.suffix)


class DiscreteSchedule(Schedule, Protocol):
    """A schedule over integer timesteps, with the Gaussian posterior of each step."""

    cfg: Any

    def elbo_weight(self, t: Tensor) -> Tensor: ...  # (B,)
    def log_variances(self, t: Tensor) -> tuple[Tensor, Tensor]: ...  # bounds
    def posterior(self, z0: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...


class Continuous(ABC):
    """Base of schedules with t in [0, 1].

    A subclass implements `alpha`, `sigma`, `target` and `denoised`, and sets `spacings`.
    """

    spacings: ClassVar[tuple[str, ...]] = ("trailing",)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the latents, (B, 1, 1, 1, 1)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise, (B, 1, 1, 1, 1)."""

    def snr(self, t: Tensor) -> Tensor:
        """(alpha / sigma)^2, (B, 1, 1, 1, 1); infinite where sigma is 0."""
        return (self.alpha(t) / self.sigma(t)).square()

    def noised(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (self.alpha(t) * z0 + self.sigma(t) * eps).to(z0.dtype)

    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the backbone, whose times are in [0, 1000)."""
        return z_t, (t * 1000).clamp_max(LAST)

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def even(self, first: float, steps: int, spacing: str) -> Tensor:
        """(steps,) float64 on the CPU, evenly spaced from `first` down towards 0 (excluded).

        Raises ValueError for invalid `steps` or `spacing`.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: want at least 1")
        if spacing not in self.spacings:
            raise ValueError(f"spacing={spacing!r}: want one of {list(self.spacings)}")
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]


class Table:
    """A float32 lookup table over discrete times, made from float64 values.

    It keeps one copy per device. Copies are never inference tensors, so that training can use a
    table that sampling created.
    """

    def __init__(self, values: np.ndarray) -> None:
        with torch.inference_mode(False):
            self._copies = {torch.device("cpu"): torch.from_numpy(values.astype(np.float32))}

    def __call__(self, t: Tensor) -> Tensor:
        """(B,) integers -> (B,) float32. Raises IndexError for a time out of range."""
        if t.device not in self._copies:
            with torch.inference_mode(False):
                self._copies[t.device] = self._copies[torch.device("cpu")].to(t.device)
        return self._copies[t.device][t]


def levels(schedule: Schedule, times: Tensor) -> list[Level]:
    """(alpha, sigma) at each of `times` (N,).

    Python floats: the coefficients of a step are computed in float64 on every device, without
    device synchronisation.
    """
    return list(zip(_numbers(schedule.alpha(times)), _numbers(schedule.sigma(times)), strict=True))


def snrs(schedule: Schedule, times: Tensor) -> list[float]:
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


def stride_landings(times: Tensor) -> list[int]:
    """The time after each CogVideoX step: t - T // N for N trailing times; negative: clean latents.

    As published: if N does not divide T, this differs from the time of the next model call. The
    cleaner rule would use that time.
    """
    timesteps = int(times[0]) + 1  # trailing times start at T - 1
    return [int(t) - timesteps // len(times) for t in times]


class Trajectory:
    """One sampling run: its times, their noise levels, and the model calls.

    The state `z` is float32 or wider; the model gets the dtype of the initial `z`.
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
        self.levels = [*levels(schedule, times), CLEAN]  # one more than times
        self.times = times.to(z.device)

    def __iter__(self) -> Iterator[tuple[int, Level, Level]]:
        """(step, level before, level after); the last step ends at clean latents."""
        for step in range(len(self.times)):
            yield step, self.levels[step], self.levels[step + 1]

    def denoised(
        self, z: Tensor, place: int, step: int, **scalars: Tensor
    ) -> tuple[Tensor, Denoised]:
        """One model call at `times[place]`: z after the hook `before`, and the estimates.

        scalars: numbers () that the network receives besides t, in the unit of t.
        """
        return self.denoised_at(z, self.times[place], step, **scalars)

    def denoised_at(
        self, z: Tensor, t: Tensor, step: int, **scalars: Tensor
    ) -> tuple[Tensor, Denoised]:
        """The same at any time t ()."""
        t = t.expand(len(z))
        given = {name: x.expand(len(z)) for name, x in scalars.items()}
        if self.hooks:
            z = self.hooks.before(z, t)
        out = self.model(z.to(self.dtype), t, step, *([given] if given else []))
        d = self.schedule.denoised(out, z, t)
        return z, self.hooks.denoised(d, t) if self.hooks else d

    def end(self, z: Tensor) -> Tensor:
        """`z` in the dtype of the initial `z`."""
        return z.to(self.dtype)


class Solver(ABC):
    """Base of samplers: a subclass implements `solve` for one Trajectory."""

    def __init__(self, cfg: SamplerConfig) -> None:
        self.cfg = cfg

    def __call__(
        self,
        model: Model,
        schedule: Schedule,
        z: Tensor,
        steps: int,
        draws: Draws,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Standard normal z (B, C, T, H, W) -> clean latents of the same shape."""
        run = Trajectory(model, schedule, z, steps, self.cfg.spacing, hooks)
        return run.end(self.solve(run, run.start, draws))

    @abstractmethod
    def solve(self, run: Trajectory, z: Tensor, draws: Draws) -> Tensor:
        """Integrates from `z` at the first level of `run` to clean latents."""


class Guided(ABC):
    """Base of guidance with several passes: a subclass implements `guided`."""

    def __init__(self, cfg: GuidanceConfig) -> None:
        self.cfg = cfg

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass | frozenset[str], ...]:
        return self.cfg.passes(signals)

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        """Outputs in the order of `passes`, each (B, C, T, H, W) -> (B, C, T, H, W)."""
        return outs[0] if len(outs) == 1 else self.guided(outs, t, steps)

    @abstractmethod
    def guided(self, outs: list[Tensor], t: Tensor, steps: int) -> Tensor:
        """The combination of two or more passes."""


def rescale_std(guided: Tensor, full: Tensor, amount: float) -> Tensor:
    """`guided` with its standard deviation moved towards that of `full` by `amount` in [0, 1].

    Lin et al. 2023 (2305.08891), eq. 15 and 16.
    """
    if not amount:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = full.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (amount * factor + (1 - amount))
