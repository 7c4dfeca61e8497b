"""Weight files of first stages: reading them, and their paths in the cache."""

import hashlib
import json
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from sandbox.config import registry
from sandbox.config.added_settings import without_added
from sandbox.config.paths import PLUGINS
from sandbox.config.root import Root, to_container
from sandbox.config.static_reader import code_alone
from sandbox.contracts import LOADING, DataConfig, State, StorageError
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.atomic import is_writable
from sandbox.storage.published import compare, parts_of, read_model, read_parts, translate_names
from sandbox.storage.weight_check import check_values, differences
from sandbox.storage.weight_contents import match_names
from sandbox.storage.weight_files import log_once, named

FIRST_STAGE_FILE = "first_stage.safetensors"  # in a run folder
PREFIX = "first_stage."  # of its names in a system


def load_weights(first_stage: nn.Module, path: Path) -> None:
    """Loads a file of any format, strictly. Raises StorageError for names that differ."""
    first_stage.load_state_dict(matching_weights(first_stage, path))


def matching_weights(first_stage: nn.Module, path: Path, mapped: bool = False) -> State:
    """The weights at `path`, with the names and shapes of `first_stage`, which may be on meta.

    Its `from_official`, if any, renames those of an official repository. `mapped`: memory-maps the
    tensors. Raises StorageError for names and shapes that differ.
    """
    own = first_stage.state_dict()
    state = read_weights(path, "vae.weights", own.keys(), mapped)
    if hasattr(first_stage, "from_official") and own.keys() != state.keys():
        state = first_stage.from_official(state)  # type: ignore[operator]
    if found := differences(own, state):
        raise StorageError(
            f"vae.weights={path}: {found.count} names or shapes differ from this configuration; "
            f"choose the vae settings it was made with, or weights=auto{found.lines}"
        )
    check_values(f"vae.weights={path}", state, own)
    return state


def read_weights(path: Path, what: str, own: Collection[str], mapped: bool = False) -> State:
    """First stage weights from a file, a run folder, or the folder of a published model or system.

    Those of a system are its first stage's, unless the names are already `own`. Weights that only
    training needs (loss.*) are left out. `what` names the setting in errors; `mapped` memory-maps
    the tensors. Raises StorageError.
    """
    if not path.exists():
        also = ", or use vae.weights=auto" if what == "vae.weights" else ""
        raise StorageError(f"{what}={path}: no such file; name one{also}")
    is_folder = path.is_dir()
    with nullcontext() if is_folder else named(what):
        state = _of_folder(path, what, mapped) if is_folder else weight_files.read(path, mapped)
    if own == state.keys():
        return state
    state = (parts_of(state, f"{what}={path}") or {}).get("vae") or state
    if any(name.startswith(PREFIX) for name in state):  # a training checkpoint
        state = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    state = match_names(state, own, lambda text: log_once(f"{what}={path}: {text}"))
    return {name: x for name, x in state.items() if not name.startswith("loss.")}


def _of_folder(folder: Path, what: str, mapped: bool) -> State:
    """The first stage in the folder of a run, a published system or a published first stage."""
    if (folder / FIRST_STAGE_FILE).is_file():
        return weight_files.read(folder / FIRST_STAGE_FILE)
    if newest := checkpoint.newest(folder / "checkpoints"):
        state = checkpoint.load_mapped(newest) if mapped else checkpoint.load(newest)
        return state["weights"] | ((state["ema"] or {}).get("average") or {})
    parts = read_parts(folder, what)
    return parts["vae"] if parts and "vae" in parts else read_model(folder, what)


def init_first_stage(first_stage: Any, path: Path) -> None:
    """Loads initial weights for training a first stage (init_from), also from a related network.

    Its `from_published` translates them. Strict, but buffers may be missing. Raises StorageError
    with the first names and shapes that differ.
    """
    own = first_stage.state_dict()
    state = read_weights(path, "init_from", own.keys())
    state = translate_names(first_stage, own.keys(), state, f"init_from={path}")
    buffers = {name for name, _ in first_stage.named_buffers()} - state.keys()
    own = {name: x for name, x in own.items() if name not in buffers}
    compare(own, state, path)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def cache_path(root: Root) -> Path:
    """The path in the cache of this configuration's first stage.

    The name has a hash of everything that affects it: settings, data, seed, and code without
    comments and docstrings. Files in `data.root` are not read.
    """
    vae = without_added(to_container(root.vae)) | {"weights": None}
    parts = [root.vae.plugin, root.data.plugin]
    if root.vae.fitted() == "trained":
        parts.append(f"reconstruction/{root.vae.regularizer()}")
    sources = [registry.source(registry.find(part)) for part in parts]
    for shared in ("_blocks", "_configs"):
        sources += [path.read_bytes() for path in sorted((PLUGINS / shared).glob("*.py"))]
    data = data_identity(root.data.all_clips())
    hashes = [hashlib.sha256(code_alone(part)).hexdigest() for part in sources]
    key = json.dumps([vae, data, root.seed, hashes], sort_keys=True)
    name = root.vae.plugin.replace("/", "-")
    file = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    found = Path(root.cache) / file
    return found if found.is_file() else cache_folder(root) / file


def cache_folder(root: Root) -> Path:
    """The folder `cache`; below `out` where the default one cannot be written."""
    is_used = root.cache != Root.cache or is_writable(Path(root.cache))
    return Path(root.cache) if is_used else Path(root.out) / "cache"


def data_identity(data: DataConfig) -> dict[str, Any]:
    """The data settings that determine the clips."""
    return {k: v for k, v in without_added(to_container(data)).items() if k not in LOADING}
