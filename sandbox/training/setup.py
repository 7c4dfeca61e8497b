"""Starts a training run: its checks before anything expensive, and its state at step 0 or later."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from sandbox.config import registry
from sandbox.config.param_groups import split_groups
from sandbox.config.root import Root, to_container
from sandbox.config.wiring import Wiring
from sandbox.contracts import CallbackConfig, ConfigError, Items
from sandbox.data.checks import check_samples
from sandbox.data.loader import Loader
from sandbox.data.randomness import Keyed
from sandbox.distributed.rank import Rank
from sandbox.model.devices import device_of, use_threads
from sandbox.model.ema import EMA
from sandbox.model.trainable import Trainable
from sandbox.runs.protocol import reset_peak_memory
from sandbox.runs.run import Run
from sandbox.storage import checkpoint
from sandbox.storage.atomic import check_space
from sandbox.training.features import fit_features
from sandbox.training.roles import add_networks
from sandbox.training.state import Training
from sandbox.training.tracking import Trackers


def check_best(wiring: Wiring) -> None:
    """Raises ConfigError where checkpoint.best_of is not a metric of the loss."""
    root, grid = wiring.root, wiring.grids[0]
    if root.checkpoint.best:
        schedule = registry.create(root.schedule)
        z = torch.zeros(1, grid.channels, 1, 2, 2)
        out = z.repeat(1, root.schedule.outputs(), 1, 1, 1)
        t = schedule.draw_t(Keyed(root.seed, 0, torch.zeros(1, dtype=torch.int64), 1))
        check_best_of(root, registry.create(root.loss)(schedule, out, z, z, t).log)


def check_best_of(root: Root, names: Iterable[str]) -> None:
    """The same, for the `names` of the metrics that the loss logs."""
    policy, found = root.checkpoint, {f"val/{name}" for name in (*names, "loss")}
    callbacks = (c for c in root.callbacks.values() if isinstance(c, CallbackConfig))
    found |= {name for callback in callbacks for name in callback.metrics()}
    if root.ema.keeps_ema():
        found |= {f"{name}_ema" for name in found}
    if policy.best and policy.best_of not in found:
        raise ConfigError(
            f"checkpoint.best_of={policy.best_of}: not measured here; want one of "
            + ", ".join(sorted(found))
        )


def checked_loader(root: Root, rank: Rank) -> Loader:
    """The loader of the training clips, before anything expensive.

    Raises DataError where a split has no usable clip or too few, PluginError for wrong samples.
    """
    source = registry.create(root.data)
    splits = {name: source.split(name) for name in ("train", "val")}
    for name, items in splits.items():
        check_samples(items, root.data, name, root.seed)
    return training_loader(root, rank, splits["train"])


def training_loader(root: Root, rank: Rank, items: Items) -> Loader:
    """The loader of one rank. Raises DataError for too few clips."""
    cfg = root.data
    return Loader(
        items, cfg.batch_size, root.seed, rank.index, rank.world, num_workers=cfg.num_workers,
        max_bad=cfg.max_bad, batch_of=cfg.batch_of, drop_incomplete=cfg.drop_incomplete,
        turns=cfg.alternates_sizes(),
    )  # fmt: skip


@contextmanager
def start(
    system: Trainable,
    run: Run,
    group: str | None = None,
    rank: Rank | None = None,
    initialise: Callable[[], None] = lambda: None,
    loader: Loader | None = None,
) -> Iterator[Training]:
    """The Training of a run, at step 0 or restored from its newest valid checkpoint.

    `initialise` loads the weights of step 0, in a run without a checkpoint; `loader`: one that
    `checked_loader` made. Leaving the block finishes the trackers. Raises DataError, StorageError,
    ConfigError.
    """
    root, rank = system.root, rank or Rank()
    device = device_of(root, rank.local)
    _check_fp16(system, device, rank)
    use_threads(root)
    newest = checkpoint.newest(run.checkpoints) if rank.index == 0 else None
    newest = rank.broadcast_plain(newest and newest.name)
    if newest is None:
        initialise()
        fit_features(system)
    add_networks(system)
    reset_peak_memory(device)
    processes = registry.create(root.trainer)
    processes.prepare(system, device, rank.world)
    system.to(device)
    trained = [(n, p) for n, p in system.named_parameters() if p.requires_grad]
    optimizer = registry.create(root.optimizer).build(trained, root.lr)
    for g in optimizer.param_groups:
        g.setdefault("initial_lr", g["lr"])
    split_groups(optimizer, {id(p): system.lr_factors.get(name, 1.0) for name, p in trained})
    for update in system.updates.values():
        update.build(registry.create(root.optimizer), root.lr or 0.0, root.trainer, rank)
    training = Training(
        system=system,
        root=root,
        loader=loader or training_loader(root, rank, registry.create(root.data).split("train")),
        run=run,
        rank=rank,
        trackers=Trackers(
            run, [registry.create(root.logger)] if root.logger and rank.index == 0 else []
        ),
        ema=EMA.of(system, registry.create(root.ema)),
        optimizer=optimizer,
        callbacks={k: registry.create(c) for k, c in sorted(root.callbacks.items()) if c},
        processes=processes,
    )  # fmt: skip
    system.ema = training.ema
    if newest is not None:
        training.restore(checkpoint.load(run.checkpoints / newest))
        print(f"resuming from step {training.step} ({newest})", flush=True)
    _check_space(training)
    run.accept()
    try:
        training.trackers.start(to_container(root), run.folder.name, group)
        if run.resumed and training.is_first:
            run.rewind(training.step)
        yield training
        training.writer.wait()
    except BaseException as e:
        error = training.finish_writing(e)
        training.trackers.finish(getattr(error, "exit_code", 1))
        if error is not e:
            raise error from e
        raise
    training.trackers.finish(0)


def _check_space(training: Training) -> None:
    """Raises StorageError where the disk has no room for one checkpoint."""
    if training.is_first and training.step < training.steps:
        trained = [p for p in training.system.parameters() if p.requires_grad]
        copies = 1 + (len(training.ema.averages()) if training.ema else 0)
        copies += training.root.optimizer.averages
        size = sum(p.numel() * p.element_size() for p in trained) * copies
        others = [p for update in training.system.updates.values() for p in update.trained]
        size += sum(p.numel() * p.element_size() for p in others)
        check_space(training.run.folder, size, "a checkpoint")


def _check_fp16(system: Trainable, device: torch.device, rank: Rank) -> None:
    """Raises ConfigError where fp16 and its loss scaler do not work."""
    if system.root.precision != "fp16":
        return
    if device.type != "cuda":
        raise ConfigError(f"precision=fp16 needs a CUDA device, here is {device}: use bf16 or fp32")
    if system.root.trainer.shards and rank.world > 1:
        raise ConfigError("precision=fp16: its loss scaler does not work with shards; use bf16")
    if system.updates:
        raise ConfigError(
            f"precision=fp16: the {', '.join(system.updates)} trains without a loss scaler: use "
            "bf16 or fp32"
        )
