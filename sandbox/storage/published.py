"""Weights of published systems: folders of safetensors files, and layouts that map their names.

A folder has one model (model*.safetensors, diffusion_pytorch_model*.safetensors, with an index if
it is split), or one subfolder per model of a system, as in diffusers.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sandbox.config import registry
from sandbox.contracts import PluginConfig, State, StorageError
from sandbox.storage.weight_check import check_values, differences, shown
from sandbox.storage.weight_contents import match_names, plain_names, without_shared_prefix
from sandbox.storage.weight_files import log_once, named, read

STEMS = ("diffusion_pytorch_model", "model")


def read_parts(folder: Path, what: str) -> dict[str, State] | None:
    """The parts of a published system by their names here, such as "backbone".

    None where no layout matches the folder. `what` names the setting in errors. Tensors are
    memory-mapped. Raises StorageError for broken files.
    """
    models = [f for f in sorted(folder.iterdir()) if f.is_dir() and list(files_of(f))]
    if layout_of(frozenset(f"{f.name}/" for f in models)) is None:
        return None
    state = {f"{f.name}/{k}": v for f in models for k, v in read_model(f, what).items()}
    return parts_of(state, f"{what}={folder}")


def layout_of(names: frozenset[str]) -> PluginConfig | None:
    """The layout that matches these names; None where there is none."""
    layouts = (registry.default("layout", p.name) for p in registry.plugins("layout"))
    return next((x for x in layouts if x.recognises(names)), None)  # type: ignore[attr-defined]


def parts_of(state: State, where: str) -> dict[str, State] | None:
    """The parts of a published state; None where no layout matches its names.

    `where` names setting and file in errors. Raises StorageError.
    """
    layout = layout_of(frozenset(state))
    if layout is None and (plain := plain_names(state)).keys() != state.keys():
        layout, state = layout_of(frozenset(plain)), plain
    if layout is None:
        return None
    try:
        return registry.create(layout).split(state)
    except (ValueError, StorageError) as e:
        raise StorageError(f"{where}: {e}") from e


def files_of(folder: Path) -> Iterator[Path]:
    """The safetensors files of a model, without those of other precisions (`.fp16.`)."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (OSError, ValueError, KeyError, AttributeError) as e:
                raise StorageError(f"{index}: not an index of weights ({e!r})") from e
            yield from (folder / Path(name).name for name in sorted(set(named)))
            return
        if (folder / f"{stem}.safetensors").is_file():
            yield folder / f"{stem}.safetensors"
            return


def read_model(folder: Path, what: str) -> State:
    """Tensors by name of the model in `folder`. Raises StorageError."""
    state: State = {}
    files = list(files_of(folder))
    if not files:
        stems = " or ".join(f"{s}.safetensors" for s in STEMS)
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        there = f" (there is {shown(others)})" if others else ""
        raise StorageError(
            f"{what}={folder}: no {stems} there, in one file or with an index{there}"
        )
    for file in files:
        with named(what):
            found = read(file)
        if twice := sorted(state.keys() & found.keys()):
            raise StorageError(f"{file}: {twice[0]} is also in another file of this model")
        state |= found
    return state


def translate_names(module: Any, own: Collection[str], state: State, where: str) -> State:
    """`state` under the names `own`: without prefixes, then through `from_published` of `module`.

    `where` names setting and file in the log.
    """
    state = match_names(state, own, lambda text: log_once(f"{where}: {text}"))
    if not hasattr(module, "from_published"):
        return state
    is_known = any(name in state for name in own)
    return module.from_published(state if is_known else without_shared_prefix(state))


def compare(own: State, weights: State, path: Path) -> None:
    """Raises StorageError for names and shapes that differ, and for values that are not finite."""
    if found := differences(own, weights):
        raise StorageError(
            f"init_from={path}: {found.count} of its weights do not fit this model; choose the "
            f"components and sizes it was made with{found.lines}"
        )
    check_values(f"init_from={path}", weights, own)
