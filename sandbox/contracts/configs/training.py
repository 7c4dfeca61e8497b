"""Configs of training: optimizer, learning rate, devices, checkpoints, EMA, callbacks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sandbox.contracts.checks import above, in_range, one_of
from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.configs.system import BackboneConfig


@dataclass
class OptimizerConfig(PluginConfig):
    """The optimizer. The peak learning rate is the top-level `lr`.

    averages: True where the optimizer has `averages()`, which returns (parameter, average) for the
    parameters that it averages. Validation, samples, the EMA and weight files then use the averages
    in place of the parameters; only training steps use the parameters themselves.
    """

    elementwise: ClassVar[bool] = True  # False: updates mix the elements of a matrix
    shardable: ClassVar[bool] = True  # False: it needs full tensors (no trainer=fsdp2)
    averages: ClassVar[bool] = False

    def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
        """Problems with this wired backbone, one line each."""
        yield from ()


@dataclass
class LRScheduleConfig(PluginConfig):
    """The learning rate over a run, as a factor of the top-level `lr`."""

    def factor(self, step: int, steps: int) -> float:
        """Factor at optimizer step `step` (from 0) of a run of `steps` steps."""
        return 1.0


@dataclass
class TrainerConfig(PluginConfig):
    """Devices and the composition of an optimizer step.

    accelerator: auto, cpu, cuda or mps; processes: ranks, one per device; accumulate: micro-batches
    per optimizer step; clip: maximum gradient norm, or null; threads: torch threads per process on
    a CPU (null: the cores that the loader's workers leave); log_every: optimizer steps between two
    lines of metrics; repeat: train on the first N micro-batches only, with the same noise, to check
    that the model can overfit them (0: off); timeout: seconds that a process waits for the others;
    bad_step: raise or skip an optimizer step whose gradient is not finite; max_bad_steps: how many
    can be skipped; low_vram: keep the frozen first stage and text encoder on the CPU and move them
    to the device only while they run (same numbers, slower by the transfers).
    """

    shards: ClassVar[bool] = False  # True: trained weights are sharded over processes
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
    """When to save checkpoints and which to keep; one is removed if no rule keeps it.

    every: optimizer steps between two checkpoints; keep: number of newest ones; milestones: steps
    between permanent ones, or 0; best: number of those with the lowest `best_of`, a metric that a
    callback measures at the same step, such as val/loss_ema; weights_every: steps between permanent
    weights-only files, which cannot be resumed, or 0; attempts, wait: how often a write is tried,
    and seconds between attempts.
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
    """An exponential moving average (EMA) of the weights."""

    def keeps_ema(self) -> bool:
        """Whether EMA weights exist; they are then validated as well (val/loss_ema)."""
        return True

    def writes_snapshot(self, step: int, steps: int) -> bool:
        """Whether all averages are written to the run folder after `step` of `steps` steps."""
        return False

    def synthesises(self) -> bool:
        """Whether task=ema can combine these snapshots into an average of another width."""
        return False

    def width_problems(self, sigma_rel: float) -> Iterator[str]:
        """Problems with this width of a synthesised average, one line each."""
        yield from ()


@dataclass(frozen=True)
class Snapshot:
    """An average of the weights after `updates` updates, under the name that its plugin gives."""

    name: str
    updates: int


@dataclass
class CallbackConfig(PluginConfig):
    """An extra action during training."""

    def measures(self, step: int) -> bool:
        """Whether it validates after all optimizer steps that are multiples of `step`."""
        return False

    def metrics(self) -> tuple[str, ...]:
        """Metrics of a denoiser's live weights that it measures besides those of the loss.

        With EMA weights, it measures each with the suffix "_ema", too.
        """
        return ()
