"""Tensors that fit a wiring: batches, latents, conditions, and folders of clips."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.config.wiring import Wiring
from sandbox.contracts import Batch, Clip, Conditions, DataConfig, DataError, Items, Slots
from sandbox.data.randomness import Keyed
from sandbox.distributed.rank import Rank
from sandbox.pipelines.encode import encode_all
from tests.helpers import tiny

WORDS = ("a red 3 moving left", "a blue 7 moving up", "a green 0 moving down", "")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, always the same."""
    return torch.randn(*shape, generator=seeded(seed))


def sizes(clip: Clip) -> tuple[int, int, int, int]:
    return clip.channels, clip.frames, clip.height, clip.width


def leave_nan_behind() -> None:
    """Memory that is given out next is full of NaN: found by what reads what it never wrote."""
    for power in range(6, 18):
        [torch.full((2**power + 64 * i,), torch.nan) for i in range(16)]


def video(clip: Clip, count: int = 2, seed: int = 0) -> Tensor:
    """(count, 3, T, H, W) in [-1, 1]."""
    return torch.rand(count, *sizes(clip), generator=seeded(seed)) * 2 - 1


def draws(count: int = 2, seed: int = 0) -> Keyed:
    return Keyed(seed, 0, torch.arange(count), count)


def batch(wiring: Wiring, count: int = 2) -> Batch:
    """A batch with every field that the data provide."""
    fields = wiring.root.data.provides()
    scalars = {n: torch.full((count,), 8.0) for n in ("fps", "frame_stride") if n in fields}
    if classes := wiring.root.data.labels():
        scalars["label"] = torch.arange(count) % float(classes)
    return Batch(
        video=video(wiring.clips[0], count),
        captions=[WORDS[i % len(WORDS)] for i in range(count)] if "captions" in fields else None,
        scalars=scalars,
        ids=[str(i) for i in range(count)],
        position=torch.arange(count),
    )


def conditions(slots: Slots, grid: Clip, count: int = 2, seed: int = 1) -> Conditions:
    """Random conditions of the sizes that `slots` promises."""
    context, image = slots.context, slots.image_context
    return Conditions(
        context=tensor(count, context.length, context.width, seed=seed) if context else None,
        context_mask=torch.ones(count, context.length, dtype=torch.bool)
        if context and context.masked
        else None,
        image_context=tensor(count, image.frames, image.length, image.width, seed=seed)
        if image
        else None,
        concat=tensor(count, slots.concat, *sizes(grid)[1:], seed=seed) if slots.concat else None,
        vector=tensor(count, slots.vector, seed=seed) if slots.vector else None,
        scalars={n: torch.full((count,), 8.0) for n in slots.scalars | slots.time_scalars},
    )


def items_of(cfg: DataConfig, split: str, folder: Path) -> tuple[Any, Items]:
    """A data source and one of its splits; data that are read get clips below `folder`."""
    source = registry.create(with_clips(cfg, folder))
    return source, source.split(split)


def with_clips(cfg: DataConfig, folder: Path, root: Root | None = None) -> DataConfig:
    """`cfg` with a root below `folder` that holds clips for it, where it reads files.

    Latents are stored with the first stage of `root`, the default one in a small size.
    """
    try:
        registry.create(cfg).split("train")
        return cfg
    except DataError:
        if "video" not in cfg.provides():
            return replace(cfg, root=stored(cfg, folder, root or tiny()))
        frames = cfg.frames * getattr(cfg, "stride", 1)
        root = folder / f"clips_{frames}x{cfg.height}x{cfg.width}"
        if not root.exists():
            write_clips(root, Clip(3, frames + 3, cfg.height, cfg.width))
        if cfg.labels():
            root = sorted_by_class(root, cfg.labels())
        own = {"meta_path": str(root / "images.json")} if vars(cfg).get("only") == "image" else {}
        own |= {name: None for name in ("train_list", "val_list") if hasattr(cfg, name)}
        return replace(cfg, root=str(root), **own)


def stored(cfg: DataConfig, folder: Path, root: Root) -> str:
    """A folder of latents of the clips that `with_clips` makes."""
    clips = registry.default("data", "video_folder")
    size = {name: getattr(cfg, name) for name in ("frames", "height", "width")}
    clips = with_clips(replace(clips, **size), folder)
    to = folder / f"latents_{len([*folder.glob('latents_*')])}"
    task = replace(registry.default("task", "encode"), to=str(to))
    cache = str(folder / "first stages")
    encode_all(replace(root, data=clips, task=task, cache=cache), Rank())
    return str(to)


def sorted_by_class(clips: Path, classes: int) -> Path:
    """The clips of `write_clips` in a folder for each class, below train/ and val/."""
    root = clips.with_name(f"{clips.name}_by_class")
    for path in sorted(clips.glob("*/*.mp4")):
        to = root / path.parent.name / f"class_{int(path.stem) % classes}" / path.name
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            to.hardlink_to(path)
    return root


def write_clips(folder: Path, size: Clip) -> None:
    """Videos with captions and pictures, four to train on and two to validate.

    Lists name them, and shards hold them.
    """
    from PIL import Image

    from sandbox.pipelines.prepare_outputs import write_shards
    from sandbox.reports.media import write_video

    about = {"source": "", "start": 0.0, "end": 1.0, "scores": {}}
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}

    for i in range(6):
        path = folder / ("train" if i < 4 else "val") / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, video(size, 1, seed=i)[0], 8.0)
        path.with_suffix(".txt").write_text(WORDS[i % 3])
        clip = {"frames": size.frames, "height": size.height, "width": size.width, "fps": 8.0}
        clip["bytes"] = path.stat().st_size
        row = {"id": str(i), "file": path, "caption": WORDS[i % 3], "clip": clip}
        splits[path.parent.name].append(about | row)
        named = folder / "videos" / "all" / path.name
        named.parent.mkdir(parents=True, exist_ok=True)
        named.hardlink_to(path)
        Image.new("RGB", (size.width, size.height), (40 * i, 0, 0)).save(path.with_suffix(".png"))
    write_shards(folder, splits, 1 << 20)
    rows = [f"{i},all,{WORDS[i % 3]} {i}" for i in range(6)]
    (folder / "metadata.csv").write_text("\n".join(["videoid,page_dir,name", *rows]))
    for table, kind, files in (
        ("metadata.json", "video", [f"videos/all/{i}.mp4" for i in range(6)]),
        ("images.json", "image", [f"train/{i}.png" for i in range(4)] + ["val/4.png", "val/5.png"]),
    ):
        entries = [
            {"file_path": name, "text": WORDS[i % 3], "type": kind} for i, name in enumerate(files)
        ]
        (folder / table).write_text(json.dumps(entries))
    (folder / "prompts.txt").write_text("\n".join(f"{WORDS[i % 3]} {i}" for i in range(6)))
    (folder / "videos.txt").write_text("\n".join(f"videos/all/{i}.mp4" for i in range(6)))
