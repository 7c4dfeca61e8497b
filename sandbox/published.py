"""Weights of published systems: folders of safetensors files, and the layouts that name them.

A folder holds one model (model*.safetensors, diffusion_pytorch_model*.safetensors, with an index
where it is in several files), or a folder for each of a system's models, as diffusers keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from sandbox import registry
from sandbox.contracts import PluginConfig, State, StorageError

STEMS = ("diffusion_pytorch_model", "model")


def read_parts(folder: Path, what: str) -> dict[str, dict[str, Tensor]] | None:
    """The parts of a published system, such as "backbone", by their names here.

    None where no layout knows the folder. `what` names the setting in messages. Tensors are mapped
    files: they take memory where they are used. Raises StorageError for files that are broken.
    """
    models = [f for f in sorted(folder.iterdir()) if f.is_dir() and list(files_of(f))]
    if layout_of(frozenset(f"{f.name}/" for f in models)) is None:
        return None
    state = {f"{f.name}/{k}": v for f in models for k, v in read_model(f, what).items()}
    return parts_of(state, f"{what}={folder}")


def layout_of(names: frozenset[str]) -> PluginConfig | None:
    """The layout whose names these are, if any."""
    layouts = (registry.default("layout", p.name) for p in registry.plugins("layout"))
    return next((x for x in layouts if x.recognises(names)), None)  # type: ignore[attr-defined]


def parts_of(state: State, where: str) -> dict[str, State] | None:
    """The parts of a published state, None where no layout has its names.

    `where` names setting and file in messages. Raises StorageError.
    """
    layout = layout_of(frozenset(state))
    if layout is None:
        return None
    try:
        return registry.create(layout).split(state)
    except (ValueError, StorageError) as e:
        raise StorageError(f"{where}: {e}") from e


def files_of(folder: Path) -> Iterator[Path]:
    """The safetensors files of a model; those of other precisions (`.fp16.`) are passed over."""
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


def read_model(folder: Path, what: str) -> dict[str, Tensor]:
    """Tensors by name of the model in `folder`. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    files = list(files_of(folder))
    if not files:
        stems = " or ".join(f"{s}.safetensors" for s in STEMS)
        raise StorageError(f"{what}={folder}: no {stems} there, in one file or with an index")
    for file in files:
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as e:
            raise StorageError(f"{file}: not a safetensors file that can be read ({e})") from e
        if twice := sorted(state.keys() & found.keys()):
            raise StorageError(f"{file}: {twice[0]} is in another file of this model, too")
        state |= found
    return state


def compare(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    """Raises StorageError with the first ten names and shapes that differ."""
    differing = [f"{k} is missing" for k in own if k not in weights]
    differing += [f"{k} is not in this model" for k in weights if k not in own]
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            differing.append(f"{name} is {_shape(weights[name])} and {_shape(own[name])} here")
    if differing:
        raise StorageError(
            f"init_from={path}: {len(differing)} of its weights do not fit this model: "
            f"{', '.join(sorted(differing)[:10])}; choose the components and sizes it was made with"
        )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
