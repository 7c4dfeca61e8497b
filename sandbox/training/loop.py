"""The training loop: a Lightning Trainer with two callbacks."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from sandbox.config import registry
from sandbox.config.param_groups import parse_entry
from sandbox.contracts import Batch, Diverged, Preempted
from sandbox.data.loader import Loader
from sandbox.data.randomness import seed_dropout, seed_of
from sandbox.reports.progress import Progress
from sandbox.runs.protocol import fingerprint
from sandbox.training.setup import check_best_of
from sandbox.training.state import Training
from sandbox.training.tracking import suspects

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # Lightning's names


def fit(training: Training, callbacks: Sequence[Callback] = ()) -> None:
    """Trains from `training.step` to `root.steps`. `callbacks` run after the configured ones.

    Raises Diverged, DataError, StorageError, Preempted (saved), KeyboardInterrupt (not saved).
    """
    root, system, cfg = training.root, training.system, training.root.trainer
    if training.step >= training.steps:
        return
    system.optimizer = training.optimizer
    for callback in training.callbacks.values():
        callback.training = training  # type: ignore[attr-defined]
    stream = Stream(training.loader, cfg.repeat, first=training.step * cfg.accumulate)
    device = system.device
    rank, strategy = training.rank, training.processes.strategy(device, training.rank.world)
    is_parallel = isinstance(strategy, ParallelStrategy)
    devices = rank.local_world if is_parallel else 1
    if device.type == "cuda" and not is_parallel:
        devices = [device.index or 0]
    _silence_lightning()
    with Progress("training", training.steps, first=training.step) as progress:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=devices,
            num_nodes=rank.world // rank.local_world if is_parallel else 1,
            strategy=strategy,
            plugins=[LightningEnvironment()],
            precision=PRECISION[root.precision],  # type: ignore[arg-type]
            max_steps=training.steps - training.step,
            max_epochs=-1,
            accumulate_grad_batches=cfg.accumulate,
            callbacks=[
                OptimizerStep(training),
                *training.callbacks.values(),
                *callbacks,
                Checkpointing(training, progress),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        try:
            with rank.handling_signals():
                trainer.fit(system, train_dataloaders=stream)
        except SystemExit as e:
            if isinstance(e.__context__, KeyboardInterrupt):  # Lightning turns it into this
                raise KeyboardInterrupt from e
            raise
        finally:
            training.loader.close()
    training.optimizer.zero_grad()
    system.to(device)  # Lightning has moved it to the CPU
    if training.is_first:
        source = registry.create(root.data)
        data = {name: fingerprint(source.split(name)) for name in ("train", "val")}
        training.run.describe(kernels=registry.create(root.kernels).report(), data=data)


def _silence_lightning() -> None:
    """Silences Lightning's advice on devices and on modules that are frozen on purpose."""
    if not torch.cuda.is_available():
        # Set by Lightning: an optimizer then looks for a driver in every step (0.1 ms).
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for text in (
        "Found .* module.* in eval mode",
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        "FSDP2-wrapped module .* returned a view tensor",  # nothing writes into it
    ):
        warnings.filterwarnings("ignore", text)


class OptimizerStep(Callback):
    """The first callback: learning rate, dropout seed, clipping, gradient check, EMA, metrics."""

    def __init__(self, training: Training) -> None:
        self.training, self.root, self.cfg = training, training.root, training.root.trainer
        self.each_micro_batch = getattr(self.root.ema, "every", "step") == "micro_batch"
        every, callbacks = self.root.checkpoint.every, filter(None, self.root.callbacks.values())
        # a first stage that is trained for the cache has no callback that measures
        self.is_measured = any(c.measures(every) for c in callbacks)
        self.metrics: list[dict[str, Tensor]] = []  # of the micro-batches of this step
        self.trained_on: list[tuple[list[str], Tensor]] = []
        self.rates: dict[str, float] = {}
        self.is_bad = False
        self.skipped_networks: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.training.scaler:
            trainer.precision_plugin.load_state_dict(self.training.scaler)
        if self.training.ema:
            self.training.ema.shard()  # the strategy has sharded the weights

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        pl_module.finished_steps = self.training.step
        first = int(batch.position[0])  # type: ignore[index]
        is_last = (batch_idx + 1) % self.cfg.accumulate == 0
        self.training.processes.begin_micro_batch(pl_module, is_last)
        seed_dropout(pl_module.device, seed_of(self.root.seed, "dropout", batch.epoch, first))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        rate = self.root.lr_schedule.factor(self.training.step, self.training.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.training.processes.clip(parameters, self.cfg.clip)
        lr, entries = (self.root.lr or 0.0) * rate, map(parse_entry, self.root.trainable or ())
        # of entries of `trainable` with another learning rate
        others = {f"lr/{name}": lr * factor for name, factor in entries if factor not in (0, 1)}
        self.rates = {"lr": lr, **others}
        # A device sync. The norm is over all ranks, so they agree.
        if self.cfg.bad_step == "skip" and not self.training.processes.norm().isfinite():
            self.is_bad = True
            optimizer.zero_grad()  # optimizers skip parameters without gradients

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        training = self.training
        training.just_stepped = (batch_idx + 1) % self.cfg.accumulate == 0
        if pl_module.updates:
            with trainer.precision_plugin.forward_context():
                self._update_networks(pl_module, batch)
        if not training.step and self.is_measured:
            check_best_of(self.root, sorted(pl_module.logged))
        self.metrics.append(pl_module.metrics)
        self.trained_on.append((batch.ids, pl_module.per_sample))
        is_update = training.just_stepped or self.each_micro_batch
        if training.ema and is_update and not self.is_bad:
            training.ema.update(training.optimizer_averages())
        if not training.just_stepped:
            return
        training.step += 1
        of_step = {"grad_norm": training.processes.norm(), **self.rates}
        metrics = {**_mean(self.metrics), **of_step}
        if self.is_bad or self.skipped_networks:
            samples = suspects(self.trained_on, training.rank)
            training.skipped.append({"step": training.step, "samples": samples})
            if not self.is_bad:
                training.skipped[-1]["networks"] = sorted({*self.skipped_networks})
            metrics["skipped"] = len(training.skipped)
        training.buffer.add(training.step, metrics, self.trained_on)
        self.metrics, self.trained_on, self.is_bad = [], [], False
        self.skipped_networks = []
        if len(training.skipped) > self.cfg.max_bad_steps:
            raise Diverged(
                f"{len(training.skipped)} steps had gradients that are not finite, more than "
                f"trainer.max_bad_steps={self.cfg.max_bad_steps}: "
                + "; ".join(f"step {s['step']} ({s['samples']})" for s in training.skipped[-3:])
            )

    def _update_networks(self, system: Any, batch: Batch) -> None:
        """Trains those that train in turn with the student; a bad step is skipped by all."""
        if self.is_bad:
            for update in system.updates.values():
                update.optimizer.zero_grad()
            return
        step, share = self.training.step, 1 / self.cfg.accumulate
        rate = self.root.lr_schedule.factor(step, self.training.steps)
        is_update = self.training.just_stepped
        self.skipped_networks += system.update_networks(batch, share, rate, is_update)


class Checkpointing(Callback):
    """The last callback: writes metrics and checkpoints, shows progress, stops on request."""

    def __init__(self, training: Training, progress: Progress) -> None:
        self.training, self.progress = training, progress
        self.policy = registry.create(training.root.checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.training.rank.install_handlers()
        if why := self.training.rank.agree_to_stop():
            raise Preempted(f"stopped by {why} before the first step; run it again to continue")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        training, cfg = self.training, self.training.root.trainer
        if not training.just_stepped:
            return
        training.check_saved()
        step, why = training.step, training.rank.agree_to_stop()
        ends = why is not None or step == training.steps
        if ends or step == 1 or step % cfg.log_every == 0:
            training.flush()
            shown = {k: v for k, v in training.latest.items() if k in ("loss", "lr")}
            self.progress.update(step, **{k: f"{v:.4g}" for k, v in shown.items()})
        if ends or self.policy.due(step):
            training.scaler = trainer.precision_plugin.state_dict()
            training.save(wait=ends)
        if training.root.ema.writes_snapshot(step, training.steps):
            training.flush()
            training.save_snapshot()
        weights_every = training.root.checkpoint.weights_every
        if weights_every and step % weights_every == 0:
            training.flush()
            training.save_weights(training.run.folder / "weights" / f"step_{step:08d}")
        if why is not None:
            raise Preempted(
                f"stopped by {why} after step {step}, which is saved in {training.run.folder}; "
                "the same command continues from there"
            )


def _mean(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(metrics) == 1:
        return metrics[0]
    return {k: torch.stack([m[k] for m in metrics]).mean() for k in metrics[-1]}


class Stream:
    """The loader's micro-batches without end: an optimizer step may span two epochs.

    With `repeat` it cycles through that many of epoch 0, starting from number `first`.
    """

    def __init__(self, loader: Loader, repeat: int = 0, first: int = 0) -> None:
        self.loader, self.repeat, self.first = loader, repeat, first

    def __len__(self) -> int:
        """So long that there is no last one; without a length Lightning prefetches one."""
        return 1 << 40

    def __iter__(self) -> Iterator[Batch]:
        if self.repeat:
            self.loader.load_state_dict(self.loader.state_dict() | {"epoch": 0, "taken": 0})
            repeated = [*islice(self.loader, self.repeat)]
            yield from islice(cycle(repeated), self.first % len(repeated), None)
        while True:
            yield from self.loader
