"""Configs of how a run trains: optimizer, rate, devices, checkpoints, average, callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sandbox.contracts.checks import above, in_range, one_of
from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.configs.system import BackboneConfig


@dataclass
class OptimizerConfig(PluginConfig):
    """How gradients change parameters. The peak learning rate is the top-level `lr`."""

    elementwise: ClassVar[bool] = True  # False: a number's change depends on others of its matrix

    def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
        """Problems with this wired backbone, one line each."""
        yield from ()


@dataclass
class LRScheduleConfig(PluginConfig):
    """The learning rate over a run, as a factor of the top-level `lr`."""

    def factor(self, step: int, steps: int) -> float:
        """Factor for optimizer step `step` (0 is the first) of a run of `steps`."""
        return 1.0


@dataclass
class TrainerConfig(PluginConfig):
    """Devices and the shape of an optimizer step.

    accelerator: auto, cpu, cuda or mps; processes: ranks, one a device; accumulate: micro-batches
    in one optimizer step; clip: largest gradient norm, null for none; threads: torch threads of a
    process on a CPU, null for what the loader's workers leave; log_every: optimizer steps between
    two lines of metrics; repeat: the first so many micro-batches come again and again, with the
    same noise (to see that a model can learn them), 0 for none; timeout: seconds that a process
    waits for the others; bad_step: what becomes of an optimizer step whose gradient is not finite,
    raise or skip; max_bad_steps: so many may be skipped; low_vram: the frozen first stage and text
    encoder wait on the CPU and are on the device for their part of a step alone, which changes no
    number and costs their transfer.
    """

    shards: ClassVar[bool] = False  # True: each process holds a part of the trained weights
    accelerator: str = "auto"
    processes: int = 1
    accumulate: int = 1
    clip: float | None = 1.0
    threads: int | None = None
    log_every: int = 20
    repeat: int = 0
    timeout: float = 600.0
    bad_step: str = "raise"
    max_bad_steps: int = 10
    low_vram: bool = False

    def problems(self) -> Iterator[str]:
        yield from one_of("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))
        for name in ("processes", "accumulate", "log_every"):
            yield from in_range(name, getattr(self, name), 1)
        yield from in_range("threads", self.threads, 1)
        yield from in_range("repeat", self.repeat, 0)
        yield from above("clip", self.clip, 0)
        yield from above("timeout", self.timeout, 0)
        yield from one_of("bad_step", self.bad_step, ("raise", "skip"))
        yield from in_range("max_bad_steps", self.max_bad_steps, 0)

    def accepts(self, optimizer: OptimizerConfig, precision: str) -> Iterator[str]:
        """Problems with this optimizer and precision, one line each."""
        yield from ()


@dataclass
class CheckpointConfig(PluginConfig):
    """When to save a checkpoint and which to keep. What one rule keeps, no other removes.

    every: optimizer steps between two; keep: newest ones; milestones: steps between those that are
    kept for good, or 0; best: so many with the lowest `best_of`, a metric that a callback measures
    at the same step, such as val/loss_ema; weights_every: steps between files of weights alone,
    which are kept for good and which nothing continues from, or 0; attempts, wait: how often a
    write is tried and the seconds in between.
    """

    every: int = 200
    keep: int = 2
    milestones: int = 0
    best: int = 0
    best_of: str = "val/loss_ema"
    weights_every: int = 0
    attempts: int = 3
    wait: float = 2.0

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in ("every", "keep", "attempts"):
            yield from in_range(name, getattr(self, name), 1)
        for name in ("milestones", "best", "weights_every", "wait"):
            yield from in_range(name, getattr(self, name), 0, 1e9)


@dataclass
class EMAConfig(PluginConfig):
    """An average of the weights beside them."""

    def keeps_ema(self) -> bool:
        """Whether there is one, which is then measured as well (val/loss_ema)."""
        return True


@dataclass
class CallbackConfig(PluginConfig):
    """What else happens during training."""

    def measures(self, step: int) -> bool:
        """Whether it measures held-out clips after every optimizer step that `step` divides."""
        return False
