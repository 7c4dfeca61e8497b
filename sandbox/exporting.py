"""The folder of a whole published system, as its original's code opens it (group `layout`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox import weight_files
from sandbox.config import Root
from sandbox.contracts import ConfigError, State
from sandbox.files import storing, write_atomic
from sandbox.latent_diffusion import LatentDiffusion
from sandbox.published import STEMS
from sandbox.whole_systems import taken_apart

TEXT = ("text_encoder", "tokenizer")  # folders that are copied as they are, where there are any
INDEX = "model_index.json"


def write_folder(
    system: LatentDiffusion, layout: Any, to: Path, dtype: torch.dtype | None, shard_mb: int
) -> list[str]:
    """Writes backbone (with its adapter merged), first stage, schedule and text encoder.

    Its index is written last. Returns folders that are absent, as this machine has them not.
    Raises ConfigError before anything is written, for what the layout cannot say.
    """
    root = system.root
    configs = {name: getattr(root, name) for name in ("backbone", "vae", "schedule", "sampler")}
    text = text_folder(root)
    known = _index(text) if text else {}
    copied = {name: known.get(name) for name in TEXT} if text else {}
    files = layout.described(configs | {"conditioning": root.conditioning}, copied)
    if (to / INDEX).exists():
        raise ConfigError(f"task.to={to}: a system is there already; name a new folder")
    if system.adapter is not None:
        system.adapter.merge(system.backbone)
    parts = taken_apart(system)
    state = layout.join({name: parts[name] for name in ("backbone", "vae")})
    for name in sorted({key.partition("/")[0] for key in state}):
        own = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{name}/")}
        write_model(to / name, own, dtype, shard_mb * 1_000_000)
    for name in copied:
        with storing(to / name):
            shutil.copytree(text / name, to / name, dirs_exist_ok=True)  # type: ignore[operator]
    for name, content in files.items():
        path = to / name
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(content, indent=2) + "\n")
    return [name for name in TEXT if name not in copied]


def text_folder(root: Root) -> Path | None:
    """The system with a text encoder and a tokenizer that the conditioning, or the run, began with.

    None where there is none on this machine.
    """
    places = (getattr(root.conditioning, "weights", None), root.init_from)
    found = (Path(p) for p in places if p and all((Path(p) / name).is_dir() for name in TEXT))
    return next(found, None)


def _index(folder: Path) -> dict[str, Any]:
    """What a system says of its parts; nothing where it says nothing."""
    path = folder / INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_model(folder: Path, state: State, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """One model as safetensors; in several files with an index where they would be larger."""

    def kept(x: Tensor) -> torch.dtype:
        return dtype if dtype and x.is_floating_point() else x.dtype

    sizes = {name: x.numel() * kept(x).itemsize for name, x in state.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    stem, places = STEMS[0], {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        own = {name: state[name].to(kept(state[name])) for name in names}
        weight_files.write(own, folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        path = folder / f"{stem}.safetensors.index.json"
        with storing(path):
            write_atomic(path, json.dumps(index, indent=2) + "\n")
