"""Configs of the noise process: schedule, loss, sampler, guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sandbox.contracts.checks import in_range
from sandbox.contracts.configs.base import PluginConfig


@dataclass
class ScheduleConfig(PluginConfig, ABC):
    """The noise process: z_t = alpha(t) z0 + sigma(t) eps, and what the network predicts."""

    kind: ClassVar[str] = "discrete"  # or "continuous"

    def outputs(self) -> int:
        """Backbone channels per latent channel: 1, or 2 with a learned variance."""
        return 1

    @abstractmethod
    def predicts(self) -> str:
        """What the network's first channels are: "eps", "v", "x0" or "velocity" (eps - z0)."""

    def ends_in_noise(self) -> bool:
        """Whether SNR(T) = 0; then eps says nothing at T, and a spacing must reach T."""
        return False

    def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
        """Problems with `times(steps, spacing)`, one line each: unknown spacings, too many steps, T
        not reached.
        """
        yield from ()


@dataclass
class LossConfig(PluginConfig):
    """From a prediction to a number."""

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()


@dataclass
class SamplerConfig(PluginConfig):
    """From noise to latents in `steps` calls of the model (or about twice as many, for second-order
    solvers), at times that the schedule spaces.
    """

    steps: int = 20
    spacing: str = "trailing"

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from schedule.spacing_problems(self.steps, self.spacing)

    def problems(self) -> Iterator[str]:
        yield from in_range("steps", self.steps, 1, 10_000)


@dataclass
class GuidanceConfig(PluginConfig):
    """How the passes of one sampling step are combined."""

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()

    def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
        """Signals dropped in each pass, the full pass first: ({}, {"text"}). One pass where nothing
        can be dropped.
        """
        return (frozenset(),)
