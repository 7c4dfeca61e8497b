"""The training engine: Lightning turns the crank; what is kept, when, and what is checked stands here.

Everything that changes while a system trains is in `Training`; a run continues from `Training.state()` bit for bit:
noise, timesteps, dropping, sample order and augmentation are keyed by position (`sandbox.randomness`), module dropout
is re-seeded for every micro-batch, and nothing else is random.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from sandbox import checkpoint, registry
from sandbox.config import Root, to_container
from sandbox.contracts import Batch, Diverged
from sandbox.data import Loader, batches
from sandbox.ema import EMA
from sandbox.latent_diffusion import prompts_batch
from sandbox.module import Trainable
from sandbox.progress import Progress
from sandbox.randomness import keyed
from sandbox.runs import Run
from sandbox.tracking import MetricBuffer, Trackers

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}  # Lightning's names


@dataclass
class Training:
    """A system with all that changes while it trains. `step` counts finished optimizer steps."""

    system: Any  # a Trainable
    root: Root
    loader: Loader
    run: Run
    trackers: Trackers
    ema: EMA | None
    ema_every: str  # "step" or "micro_batch"
    optimizer: torch.optim.Optimizer
    step: int = 0
    just_stepped: bool = False  # whether the last micro-batch ended an optimizer step
    buffer: MetricBuffer = field(default_factory=MetricBuffer)

    def state(self) -> dict[str, Any]:
        """Plain containers and tensors: what a checkpoint holds."""
        return {
            "step": self.step,
            "weights": self.system.trainable_state(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "frozen": self.system.frozen_parts(),
        }

    def sample(self, prompts: list[str], count: int) -> None:
        """Videos and a sheet of `prompts`, else of the data's first `count`, as task=sample makes them of this step."""
        from sandbox.outcome import write_clips

        captions = prompts or registry.create(self.root.data).prompts()[:count] or [""] * count
        with self.averaged(), self.evaluating():
            video = self.system.sample(prompts_batch(captions, self.system.device)).cpu()
        paths = write_clips(self.run.samples / f"step_{self.step:08}", captions, video)
        self.trackers.images(self.step, "samples", paths[-1:])
        for caption, path in zip(captions, paths[:-1][:4], strict=False):
            self.trackers.video(self.step, f"samples/{path.stem}", path, caption)

    def validate(self, count: int) -> None:
        """The loss on `count` held-out clips, with live and averaged weights, on the same noise each time."""
        val = registry.create(self.root.data).split("val")
        found: dict[str, float] = {}
        for suffix, weights in (("", nullcontext()), *([("_ema", self.averaged())] if self.ema else [])):
            with weights, self.evaluating(), torch.no_grad():
                losses, seen = [], 0
                for batch in batches(val, min(count, 64), self.root.seed):
                    batch = self.system.transfer_batch_to_device(batch, self.system.device, 0)
                    losses.append(self.system.step(batch, self.system.draws(batch)).per_sample)
                    seen += batch.size
                    if seen >= count:
                        break
                found[f"val/loss{suffix}"] = torch.cat(losses)[:count].mean().item()
        self.trackers.metrics(self.step, found)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode inside the block; the global generator is left as it was."""
        was = self.system.training
        self.system.eval()
        with torch.random.fork_rng():
            yield
        self.system.train(was)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are the system's inside the block, where there is an average."""
        with self.ema.applied(self.system) if self.ema else nullcontext():
            yield

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`, before training starts."""
        self.system.check_frozen(state["frozen"])
        self.step = state["step"]
        self.system.load_trainable(state["weights"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])


@contextmanager
def start(system: Trainable, run: Run, group: str | None = None) -> Iterator[Training]:
    """Everything that a run trains with, at step 0 or where its newest good checkpoint stands.

    Trackers are told the end when the block is left. Raises DataError, StorageError.
    """
    root = system.root
    named = [(n, p) for n, p in system.named_parameters() if p.requires_grad]
    optimizer = registry.create(root.optimizer).build(named, root.lr)
    for g in optimizer.param_groups:
        g.setdefault("initial_lr", g["lr"])
    cfg = root.data
    items = registry.create(cfg).split("train")
    loader = Loader(items, cfg.batch_size, root.seed, num_workers=cfg.num_workers, max_bad=cfg.max_bad)
    rule = registry.create(root.ema)
    trackers = Trackers(run, [registry.create(root.logger)] if root.logger is not None else [])
    training = Training(system, root, loader, run, trackers, EMA.of(system, rule), rule.every, optimizer)
    try:
        trackers.start(to_container(root), run.folder.name, group)
        newest = checkpoint.newest(run.checkpoints)
        if newest is not None:
            training.restore(checkpoint.load(newest))
            run.rewind(training.step)
            print(f"continuing from step {training.step} ({newest.name})", flush=True)
        yield training
    except BaseException as e:
        trackers.finish(getattr(e, "exit_code", 1))
        raise
    trackers.finish(0)


class Stream:
    """The loader's micro-batches without end: an optimizer step may span two epochs, so that none is a partial one."""

    def __init__(self, loader: Loader, repeat: int = 0) -> None:
        self.loader, self.repeat = loader, repeat

    def __iter__(self) -> Iterator[Batch]:
        if self.repeat:
            yield from cycle([*islice(self.loader, self.repeat)])
        while True:
            yield from self.loader


def fit(training: Training, callbacks: Sequence[Callback] = (), threads: int | None = None) -> None:
    """Trains from `training.step` to `root.steps`; `callbacks` come after those of the configuration.

    Raises Diverged, DataError, Preempted.
    """
    root = training.root
    if training.step >= root.steps:
        return
    trainer_cfg = root.trainer
    use_threads(threads or trainer_cfg.threads, root.data.num_workers)
    engine = Engine(training)
    extra = [registry.create(c) for _, c in sorted(root.callbacks.items()) if c is not None]
    for callback in extra:
        callback.training = training
    training.system.optimizer = training.optimizer
    _quiet()
    trainer = Trainer(
        accelerator="gpu" if trainer_cfg.accelerator == "cuda" else trainer_cfg.accelerator,
        devices=1,
        strategy=registry.create(trainer_cfg).strategy(),
        precision=PRECISION[root.precision],  # type: ignore[arg-type]
        max_steps=root.steps - training.step,
        max_epochs=-1,
        accumulate_grad_batches=trainer_cfg.accumulate,
        gradient_clip_val=trainer_cfg.clip,
        callbacks=[engine, *extra, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(training.system, train_dataloaders=Stream(training.loader, trainer_cfg.repeat))
    engine.finish()


def _quiet() -> None:
    """Lightning's advice on devices, products and modules that are frozen on purpose; its warnings of substance stay."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for text in ("Found .* module.* in eval mode", ".*LeafSpec.*", ".*does not have many workers.*", ".*GPU available but not used.*"):
        warnings.filterwarnings("ignore", text)


def use_threads(threads: int | None, workers: int) -> None:
    """Torch threads of this process: those asked for, else the cores that loader workers leave."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores - workers))


class Engine(Callback):
    """What happens around every step: learning rate, dropout seed, average, metrics, checks, checkpoints, progress."""

    def __init__(self, training: Training) -> None:
        self.training, self.root = training, training.root
        self.policy = registry.create(self.root.checkpoint)
        self.ids: list[tuple[int, list[str]]] = []  # of the steps whose losses have not been looked at

    def on_train_start(self, trainer: Trainer, system: Any) -> None:
        first, total = self.training.step, self.root.steps
        self.progress = Progress("training", total, first=first)
        self.gathered: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, system: Any, batch: Batch, index: int) -> None:
        seed = int(keyed(self.root.seed, "dropout", batch.epoch, int(batch.position[0])).integers(2**62))
        torch.default_generator.manual_seed(seed)
        if system.device.type == "cuda":
            torch.cuda.default_generators[system.device.index or 0].manual_seed(seed)

    def on_before_optimizer_step(self, trainer: Trainer, system: Any, optimizer: Any) -> None:
        factor = self.root.lr_schedule.factor(self.training.step, self.root.steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def on_train_batch_end(self, trainer: Trainer, system: Any, out: Any, batch: Batch, index: int) -> None:
        training = self.training
        self.gathered.append(system.metrics)
        self.ids.append((training.step, batch.ids))
        training.just_stepped = (index + 1) % self.root.trainer.accumulate == 0
        if training.ema and (training.just_stepped or training.ema_every == "micro_batch"):
            training.ema.update()
        if not training.just_stepped:
            return
        training.step += 1
        training.buffer.add(training.step, _mean(self.gathered))
        self.gathered = []
        last = training.step == self.root.steps
        if training.step % self.root.trainer.log_every == 0 or last or training.step == 1:
            self.flush()
        if self.policy.due(training.step) or last:
            self.save()

    def flush(self) -> None:
        """Writes the metrics of the steps since the last time; raises Diverged for a loss that is not finite."""
        training, shown = self.training, {}
        lr = training.optimizer.param_groups[0]["lr"]
        rows = training.buffer.flush()
        for step, metrics in rows:
            if not all(v == v and abs(v) != float("inf") for v in metrics.values()):
                ids = [i for s, names in self.ids if s == step - 1 for i in names]
                raise Diverged(
                    f"step {step}: {', '.join(f'{k}={v}' for k, v in metrics.items())} is not finite; samples "
                    f"{', '.join(ids[:8])}; lower lr={self.root.lr} or look at these samples"
                )
            shown = metrics
        if rows:
            rows[-1][1]["lr"] = lr
            training.trackers.metrics_of(rows)
        self.ids = []
        self.progress.update(training.step, **{k: f"{v:.4g}" for k, v in list(shown.items())[:2]})

    def save(self) -> None:
        """Metrics first: a resumed run does not repeat the steps before its checkpoint."""
        self.flush()
        cfg, folder = self.policy.cfg, self.training.run.checkpoints
        checkpoint.save(folder, self.training.state(), self.training.step, attempts=cfg.attempts, wait=cfg.wait)
        checkpoint.prune(folder, cfg.keep, cfg.milestones)

    def finish(self) -> None:
        self.progress.__exit__()


def _mean(gathered: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(gathered) == 1:
        return gathered[0]
    return {k: torch.stack([g[k] for g in gathered]).mean() for k in gathered[0]}
