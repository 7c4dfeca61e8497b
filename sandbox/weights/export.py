"""Exports a system to a folder in the format of its original code (group `layout`)."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.config.root import Root
from sandbox.contracts import ConfigError, State
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.storage import weight_files
from sandbox.storage.atomic import storage_errors, write_atomic
from sandbox.storage.published import STEMS
from sandbox.weights.system_files import split

TEXT = ("text_encoder", "tokenizer")  # folders that are copied unchanged
INDEX = "model_index.json"


def write_folder(
    system: LatentDiffusion, layout: Any, to: Path, dtype: torch.dtype | None, shard_mb: int
) -> list[str]:
    """Writes backbone (with its adapter merged), first stage, schedule and text encoder.

    The index is written last. Returns the text folders that this machine does not have. Raises
    ConfigError before writing where the layout cannot represent the system.
    """
    root = system.root
    configs = {name: getattr(root, name) for name in ("backbone", "vae", "schedule", "sampler")}
    text = text_folder(root)
    known = _index(text) if text else {}
    copied = {name: known.get(name) for name in TEXT} if text else {}
    files = layout.described(configs | {"conditioning": root.conditioning}, copied)
    if (to / INDEX).exists():
        raise ConfigError(f"task.to={to}: the folder has a system already; name a new folder")
    if system.adapter is not None:
        system.adapter.merge(system.backbone)
    parts = split(system)
    state = layout.join({name: parts[name] for name in ("backbone", "vae")})
    for name in sorted({key.partition("/")[0] for key in state}):
        own = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{name}/")}
        write_model(to / name, own, dtype, shard_mb * 1_000_000)
    for name in copied:
        with storage_errors(to / name):
            shutil.copytree(text / name, to / name, dirs_exist_ok=True)  # type: ignore[operator]
    for name, content in files.items():
        path = to / name
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content, indent=2) + "\n")
    return [name for name in TEXT if name not in copied]


def text_folder(root: Root) -> Path | None:
    """The folder with the text encoder and tokenizer of the conditioning or of `init_from`.

    None where this machine has none.
    """
    places = (getattr(root.conditioning, "weights", None), root.init_from)
    found = (Path(p) for p in places if p and all((Path(p) / name).is_dir() for name in TEXT))
    return next(found, None)


def _index(folder: Path) -> dict[str, Any]:
    """The index of a system's parts; empty where there is none."""
    path = folder / INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_model(folder: Path, state: State, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Writes one model as safetensors; above `shard_bytes` as several files with an index."""

    def target(x: Tensor) -> torch.dtype:
        return dtype if dtype and x.is_floating_point() else x.dtype

    sizes = {name: x.numel() * target(x).itemsize for name, x in state.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    stem, places = STEMS[0], {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        own = {name: state[name].to(target(state[name])) for name in names}
        weight_files.write(own, folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        path = folder / f"{stem}.safetensors.index.json"
        with storage_errors(path):
            write_atomic(path, json.dumps(index, indent=2) + "\n")
