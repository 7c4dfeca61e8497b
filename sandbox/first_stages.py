"""Where a first stage gets its weights: a file, the cache, or training it now (`vae.weights`).

With weights=auto a first stage is fitted or trained once for its exact (configuration, data, seed,
code) and kept in the cache; later runs and the other jobs of a sweep use it, whatever optimizer or
schedule they compare. A lock keeps jobs that start together from training it twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sandbox import checkpoint, registry
from sandbox.config import Root, to_container
from sandbox.contracts import ConfigError, DataConfig, StorageError
from sandbox.data import batches
from sandbox.files import storing
from sandbox.published import parts_of, read_model, read_parts
from sandbox.rank import Rank

CALIBRATION_CLIPS = 512
KEPT = "first_stage.safetensors"  # in a run folder
LOADING = frozenset(  # how data come, not what they are
    {"batch_size", "bucket_batch_sizes", "drop_incomplete", "num_workers", "max_bad"}
)
TRAINED_WITH = {"optimizer": "adamw", "lr_schedule": "warmup_cosine", "ema": "warmup"}


def prepare_first_stage(
    root: Root, first_stage: nn.Module, folder: Path | None = None, rank: Rank | None = None
) -> None:
    """Gives `first_stage` its weights. Raises StorageError for a file that does not fit.

    A run keeps the first stage that it trains on in its `folder`, and goes on with that one
    whatever becomes of the cache: latents of another first stage would mean something else.
    """
    cfg, kept = root.vae, folder / KEPT if folder else None
    if cfg.weights is None or cfg.fitted() == "none":
        return
    if kept and kept.is_file():
        load_weights(first_stage, kept)
        return
    if cfg.weights != "auto":
        load_weights(first_stage, Path(cfg.weights))
        return
    path = cached(root)
    with locked(path):
        if not path.is_file():
            how = "fitting" if cfg.fitted() == "closed_form" else "training"
            print(f"{how} the first stage {cfg.plugin} once; it is kept in {path}", flush=True)
            make(root, first_stage, rank)
            checkpoint.export_weights(first_stage.state_dict(), path)
        if kept:
            _keep(path, kept)
    try:
        load_weights(first_stage, kept or path)
    except StorageError as e:
        raise StorageError(f"{e}; it is only kept to save time: delete {path}") from e


def _keep(path: Path, kept: Path) -> None:
    """The same file under another name, or a copy where the file system cannot; whole, or not."""
    part = kept.with_name(f".{kept.name}.part")
    with storing(kept):
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        part.replace(kept)


def make(root: Root, first_stage: Any, rank: Rank | None = None) -> None:
    """Fits or trains `first_stage` on the training split, in this process alone."""
    if root.vae.fitted() == "closed_form":
        train = registry.create(root.data).split("train")
        first_stage.fit(b.video for b in batches(train, 256, root.seed))
        return
    from sandbox.tasks.train_vae import train_in_cache

    load_weights(first_stage, train_in_cache(_plain(root), (rank or Rank()).alone()))


def _plain(root: Root) -> Root:
    """`root` without settings of the run that a shared first stage must not depend on."""
    fixed = {group: registry.default(group, name) for group, name in TRAINED_WITH.items()}
    machine = {name: getattr(root.trainer, name) for name in ("accelerator", "threads")}
    trainer = replace(registry.default("trainer", "single"), **machine)
    return replace(root, precision="fp32", trainer=trainer, **fixed)


def calibrate(root: Root, first_stage: Any) -> None:
    """Measures the scale of the latents on training clips, where it is left to the data."""
    train = registry.create(root.data).split("train")

    def some() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches(train, 64, root.seed)):
            if i * 64 >= CALIBRATION_CLIPS:
                return
            assert batch.video is not None  # `batches` loads clips
            yield batch.video

    first_stage.calibrate(some())


def load_weights(first_stage: nn.Module, path: Path) -> None:
    """Strictly loads a file of any origin. Raises StorageError with names that differ."""
    if not path.exists():
        raise StorageError(f"vae.weights={path}: no such file; name one, or use vae.weights=auto")
    own = first_stage.state_dict()
    state = _published(path) if path.is_dir() else checkpoint.read_foreign(path)
    if own.keys() != state.keys():  # a whole system, or with what its training needed
        state = (parts_of(state, f"vae.weights={path}") or {}).get("vae") or state
    strange = sorted(set(own) ^ set(state))
    strange += [k for k in own if k in state and own[k].shape != state[k].shape]
    if strange:
        raise StorageError(
            f"vae.weights={path}: {len(strange)} names or shapes differ from this configuration: "
            f"{', '.join(strange[:10])}; choose the vae settings it was made with, or weights=auto"
        )
    first_stage.load_state_dict(state)


def _published(folder: Path) -> dict[str, torch.Tensor]:
    """The first stage in the folder of a published system, or of that model alone."""
    parts = read_parts(folder, "vae.weights")
    return parts["vae"] if parts and "vae" in parts else read_model(folder, "vae.weights")


def cached(root: Root) -> Path:
    """Where the first stage of this configuration is kept.

    All that shapes it is in the name's hash: settings, data, seed, code. Files in `data.root` are
    not looked at.
    """
    vae, parts = to_container(root.vae) | {"weights": None}, [root.vae.plugin, root.data.plugin]
    if root.vae.fitted() == "trained":
        parts.append(f"reconstruction/{root.vae.regularizer()}")
    files = [registry.find(part).path for part in parts]
    for shared in ("_blocks", "_configs"):
        files += Path(registry.__file__).parent.parent.glob(f"plugins/{shared}/*.py")
    code = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(filter(None, files))]
    key = json.dumps([vae, data_identity(root.data), root.seed, code], sort_keys=True)
    name = root.vae.plugin.replace("/", "-")
    return Path(root.cache) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time works on `path`; the others wait, and say so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise ConfigError(
            f"cache={path.parent}: cannot be written ({e.strerror}); choose another folder"
        ) from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that makes {path.name}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What of a data configuration decides what clips are."""
    names = [f.name for f in fields(data) if f.name not in LOADING]
    return {name: to_container(getattr(data, name)) for name in names}
