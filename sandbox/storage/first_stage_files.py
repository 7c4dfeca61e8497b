"""Weights of first stages in files: reading those of any origin, and their place in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from sandbox.config import registry
from sandbox.config.paths import PLUGINS
from sandbox.config.root import Root, to_container
from sandbox.config.static_reader import code_alone
from sandbox.contracts import LOADING, DataConfig, State, StorageError
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.published import compare, parts_of, read_model, read_parts

KEPT = "first_stage.safetensors"  # in a run folder
OURS = "first_stage."  # before its names in a system


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

    The name holds a hash of all that shapes it: settings, data, seed, and code without comments
    and docstrings. Files in `data.root` are not read.
    """
    vae, parts = to_container(root.vae) | {"weights": None}, [root.vae.plugin, root.data.plugin]
    if root.vae.fitted() == "trained":
        parts.append(f"reconstruction/{root.vae.regularizer()}")
    sources = [registry.source(registry.find(part)) for part in parts]
    for shared in ("_blocks", "_configs"):
        sources += [path.read_bytes() for path in sorted((PLUGINS / shared).glob("*.py"))]
    data = data_identity(root.data.all_clips())
    hashes = [hashlib.sha256(code_alone(part)).hexdigest() for part in sources]
    key = json.dumps([vae, data, root.seed, hashes], sort_keys=True)
    name = root.vae.plugin.replace("/", "-")
    return Path(root.cache) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"


def data_identity(data: DataConfig) -> dict[str, Any]:
    """What of a data configuration decides what clips are."""
    names = [f.name for f in fields(data) if f.name not in LOADING]
    return {name: to_container(getattr(data, name)) for name in names}
