"""Where a first stage gets its weights: a file, the cache, or training it now (`vae.weights`).

With weights=auto a first stage is fitted or trained once for its exact (configuration, data, seed,
code) and kept in the cache; later runs and the other jobs of a sweep use it, whatever optimizer or
schedule they compare. A lock keeps jobs that start together from training it twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sandbox import checkpoint, registry, weight_files
from sandbox.config import Root, to_container
from sandbox.contracts import LOADING, DataConfig, State, StorageError
from sandbox.data import batches
from sandbox.files import locked, replacing, storing
from sandbox.published import compare, parts_of, read_model, read_parts
from sandbox.rank import Rank

CALIBRATION_CLIPS = 512
KEPT = "first_stage.safetensors"  # in a run folder
OURS = "first_stage."  # before its names in a system
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
            weight_files.write(first_stage.state_dict(), path)
        if kept:
            _keep(path, kept)
    try:
        load_weights(first_stage, kept or path)
    except StorageError as e:
        raise StorageError(f"{e}; it is only kept to save time: delete {path}") from e


def _keep(path: Path, kept: Path) -> None:
    """The same file under another name, or a copy where the file system cannot; whole, or not."""
    with storing(kept), replacing(kept) as part:
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)


def make(root: Root, first_stage: Any, rank: Rank | None = None) -> None:
    """Fits or trains `first_stage` on the training split, in this process alone."""
    if root.vae.fitted() == "closed_form":
        train = registry.create(root.data.all_clips()).split("train")
        first_stage.fit(b.video for b in batches(train, 256, root.seed))
        return
    from sandbox.tasks.train_vae import train_in_cache

    load_weights(first_stage, train_in_cache(_plain(root), (rank or Rank()).alone()))


def _plain(root: Root) -> Root:
    """`root` without settings of the run that a shared first stage must not depend on."""
    fixed = {group: registry.default(group, name) for group, name in TRAINED_WITH.items()}
    machine = {name: getattr(root.trainer, name) for name in ("accelerator", "threads")}
    trainer = replace(registry.default("trainer", "single"), **machine)
    return replace(root, data=root.data.all_clips(), precision="fp32", trainer=trainer, **fixed)


def calibrate(root: Root, first_stage: Any, device: torch.device) -> None:
    """Measures the scale of the latents on training clips, where it is left to the data.

    `device`: where the first stage is.
    """
    train = registry.create(root.data.all_clips()).split("train")

    def some() -> Iterator[torch.Tensor]:
        for i, batch in enumerate(batches(train, 64, root.seed)):
            if i * 64 >= CALIBRATION_CLIPS:
                return
            assert batch.video is not None  # `batches` loads clips
            yield batch.video.to(device)

    first_stage.calibrate(some())


def load_weights(first_stage: nn.Module, path: Path) -> None:
    """Strictly loads a file of any origin. Raises StorageError with names that differ."""
    first_stage.load_state_dict(fitting_weights(first_stage, path))


def fitting_weights(first_stage: nn.Module, path: Path, mapped: bool = False) -> State:
    """The weights at `path`, whose names and shapes are those of `first_stage`, meta or not.

    `mapped`: numbers are read when they are looked at. Raises StorageError with what differs.
    """
    own = first_stage.state_dict()
    state = read_weights(path, "vae.weights", own.keys(), mapped)
    strange = sorted(set(own) ^ set(state))
    strange += [k for k in own if k in state and own[k].shape != state[k].shape]
    if strange:
        raise StorageError(
            f"vae.weights={path}: {len(strange)} names or shapes differ from this configuration: "
            f"{', '.join(strange[:10])}; choose the vae settings it was made with, or weights=auto"
        )
    return state


def read_weights(path: Path, what: str, own: Collection[str], mapped: bool = False) -> State:
    """A first stage's weights at `path`; where its names are not `own`, those in a whole system.

    `path`: a file of any origin, a run folder, or that of a published system or first stage. What
    only its training needed (loss.*) is left out. `what` names the setting. `mapped`: numbers are
    read when they are looked at. Raises StorageError.
    """
    if not path.exists():
        also = ", or use vae.weights=auto" if what == "vae.weights" else ""
        raise StorageError(f"{what}={path}: no such file; name one{also}")
    is_folder = path.is_dir()
    state = _of_folder(path, what, mapped) if is_folder else weight_files.read(path, mapped)
    if own == state.keys():
        return state
    state = (parts_of(state, f"{what}={path}") or {}).get("vae") or state
    if any(name.startswith(OURS) for name in state):  # with what else trained beside it
        state = {k.removeprefix(OURS): v for k, v in state.items() if k.startswith(OURS)}
    return {name: x for name, x in state.items() if not name.startswith("loss.")}


def _of_folder(folder: Path, what: str, mapped: bool) -> State:
    """The first stage of a run, finished or not, of a published system, or of that model alone."""
    if (folder / KEPT).is_file():
        return weight_files.read(folder / KEPT)
    if newest := checkpoint.newest(folder / "checkpoints"):
        state = checkpoint.skim(newest) if mapped else checkpoint.load(newest)
        return state["weights"] | ((state["ema"] or {}).get("average") or {})
    parts = read_parts(folder, what)
    return parts["vae"] if parts and "vae" in parts else read_model(folder, what)


def init_first_stage(first_stage: Any, path: Path) -> None:
    """Weights to train a first stage from (init_from), also of a related network.

    Those are translated by its `from_published`. Strict; but numbers that it measures itself may be
    absent. Raises StorageError with the first ten names and shapes that differ.
    """
    own = first_stage.state_dict()
    state = read_weights(path, "init_from", own.keys())
    if hasattr(first_stage, "from_published"):
        state = first_stage.from_published(state)
    measured = {name for name, _ in first_stage.named_buffers()} - state.keys()
    own = {name: x for name, x in own.items() if name not in measured}
    compare(own, state, path)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def cached(root: Root) -> Path:
    """Where the first stage of this configuration is kept.

    All that shapes it is in the name's hash: settings, data, seed, code. Files in `data.root` are
    not looked at.
    """
    vae, parts = to_container(root.vae) | {"weights": None}, [root.vae.plugin, root.data.plugin]
    if root.vae.fitted() == "trained":
        parts.append(f"reconstruction/{root.vae.regularizer()}")
    code = [registry.source(registry.find(part)) for part in parts]
    for shared in ("_blocks", "_configs"):
        files = Path(registry.__file__).parent.parent.glob(f"plugins/{shared}/*.py")
        code += [path.read_bytes() for path in sorted(files)]
    data = data_identity(root.data.all_clips())
    hashes = [hashlib.sha256(part).hexdigest() for part in code]
    key = json.dumps([vae, data, root.seed, hashes], sort_keys=True)
    name = root.vae.plugin.replace("/", "-")
    return Path(root.cache) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What of a data configuration decides what clips are."""
    names = [f.name for f in fields(data) if f.name not in LOADING]
    return {name: to_container(getattr(data, name)) for name in names}
