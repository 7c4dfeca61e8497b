"""Checks of data before a run: the first samples keep the contract, and clips are usable."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.contracts import (
    LABEL,
    NUMBERS,
    SAMPLE_TENSORS,
    BadItem,
    Bucketed,
    Clip,
    DataConfig,
    DataError,
    Items,
    PluginError,
)
from sandbox.data.batching import TRIES, Bad, lines
from sandbox.data.randomness import keyed

SAMPLES = 4  # of a split that are looked at
SLACK = 0.5  # that pixels may be outside [-1, 1], after a sharp resize
DARK, BRIGHT = 0.5 / 255, 0.9  # pixels in [0, 1]; 8-bit values in [-1, 1] are never as near to 0
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FIELDS = {"captions": "caption", "prompts": ""}  # of DataConfig.provides, as keys of a sample

log = logging.getLogger(__name__)


def check_samples(items: Items, cfg: DataConfig, split: str, seed: int) -> None:
    """Loads the first samples of a split.

    Raises DataError where no clip is usable, PluginError where a sample breaks the contract of
    `Items.load`. Of training clips no more are tried than may be unusable (data.max_bad).
    """
    bad: Bad = {}
    tries = max(cfg.max_bad, TRIES) if split == "train" else len(items)
    found = list(islice(_usable(items, seed, bad, tries), SAMPLES))
    if not found and len(bad) == len(items) > 0:
        reasons = "; ".join(lines(bad)[:SAMPLES])
        fix = "fix or remove them"
        if split == "val":
            fix += ", or hold out others (train/ and val/, data.val_fraction)"
        raise DataError(
            f"data={_name(cfg)}: none of the {len(bad)} clips of {split!r} is usable: {fix}: "
            f"{reasons}"
        )
    for name, sample, clip in found:
        check_sample(name, sample, cfg, clip)
    _check_range([sample["video"] for _, sample, _ in found if "video" in sample], cfg)


def check_sample(name: str, sample: Any, cfg: DataConfig, clip: Clip | None = None) -> None:
    """Raises PluginError where a sample breaks the contract; `clip`: the size of its bucket."""
    if problem := next(_problems(sample, cfg, clip), None):
        raise PluginError(f"data={_name(cfg)}{_place(cfg)}: sample {name!r}: {problem}")


def _usable(
    items: Items, seed: int, bad: Bad, tries: int
) -> Iterator[tuple[str, Any, Clip | None]]:
    """Id, sample, and the size that it is to have where items report it."""
    for index in range(min(len(items), tries)):
        name = items.id(index)
        key = (seed, "data", 0, name)
        clip = items.bucket(index, keyed(*key)) if isinstance(items, Bucketed) else None
        try:
            yield name, items.load(index, keyed(*key)), clip
        except BadItem as e:
            bad[name] = str(e)


def _problems(sample: Any, cfg: DataConfig, clip: Clip | None) -> Iterator[str]:
    """What breaks the contract, first what explains the rest."""
    if not isinstance(sample, dict):
        yield f"it is {_kind(sample)}: want a dict with 'video' and the like"
        return
    wanted = {FIELDS.get(name, name) for name in cfg.provides()} - {""}
    for name in sorted(wanted & {*SAMPLE_TENSORS, *NUMBERS, "caption"}):
        if name not in sample:
            has = sorted(map(str, sample))
            yield f"it has no {name!r}, which Config.provides() lists; it has {has}"
    for name in ("video", "image"):
        if name in sample:
            yield from _pixel_problems(name, sample[name], cfg, clip if name == "video" else None)
    for name in ("stored", "text", "no_text"):
        if name in sample:
            yield from _tensor_problems(name, sample[name])
    if "caption" in sample and not isinstance(sample["caption"], str):
        yield f"'caption' is {_kind(sample['caption'])}: want text"
    for name in sorted(NUMBERS & sample.keys()):
        try:
            is_number = not isinstance(sample[name], str | bytes)
            is_number = is_number and math.isfinite(float(sample[name]))
        except (TypeError, ValueError, RuntimeError):
            is_number = False
        if not is_number:
            yield f"{name!r} is {_kind(sample[name])}: want a finite number"
        elif name == LABEL and float(sample[name]) not in range(cfg.labels()):
            yield f"'label' is {float(sample[name]):g}: want a number below {cfg.labels()} classes"


def _tensor_problems(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"{name!r} is {_kind(value)}: want a tensor (torch.from_numpy(...))"
    elif value.dtype not in FLOATS:
        yield f"{name!r} is {value.dtype}: want torch.float32" + (
            ", such as x.float() / 127.5 - 1" if value.dtype == torch.uint8 else ""
        )
    elif not value.isfinite().all():
        yield f"{name!r} has values that are not finite"


def _pixel_problems(name: str, value: Any, cfg: DataConfig, clip: Clip | None) -> Iterator[str]:
    problems = [*_tensor_problems(name, value)]
    yield from problems
    if not isinstance(value, Tensor):
        return
    shape = tuple(value.shape)
    sizes = cfg.clips() if clip is None else (clip,)
    shapes = [(c.channels, c.frames, c.height, c.width) for c in sizes]
    is_right = len(shape) == 4 and shape[0] == 3 if name == "image" else shape in shapes
    if not is_right:
        hint = ""
        if len(shape) == 4 and shape[0] != 3 and shape[1] == 3:
            hint = "; frames come after channels: video.transpose(0, 1)"
        elif len(shape) == 4 and shape[-1] == 3:
            hint = "; channels come first: video.permute(3, 0, 1, 2)"
        elif len(shape) == 3:
            hint = "; an image is a clip of one frame: image[:, None]"
        want = shapes[0] if name == "video" else "(3, frames, height, width)"
        yield f"{name!r} has shape {shape}: want {want}{hint}"
    if not problems and value.numel():
        low, high = value.min().item(), value.max().item()
        if low < -1 - SLACK or high > 1 + SLACK:
            yield f"{name!r} has values from {low:.4g} to {high:.4g}: want [-1, 1]" + (
                ", such as x / 127.5 - 1" if low >= 0 and high <= 255 else ""
            )


def _check_range(videos: list[Tensor], cfg: DataConfig) -> None:
    """Raises PluginError for pixels in [0, 1]; logs where they may be."""
    if not videos or min(v.min().item() for v in videos) < 0:
        return
    low, high = min(v.min().item() for v in videos), max(v.max().item() for v in videos)
    seen = f"data={_name(cfg)}{_place(cfg)}: 'video' has values from {low:.3g} to {high:.3g}"
    if low <= DARK and high >= BRIGHT:
        raise PluginError(f"{seen} in {len(videos)} samples: want [-1, 1], such as 2 * x - 1")
    log.warning("%s in %s samples; pixels are to be in [-1, 1]", seen, len(videos))


def _name(cfg: DataConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def _place(cfg: DataConfig) -> str:
    path = registry.find(cfg.plugin).path
    return f" ({path}), Items.load" if path else ""


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return f"a {type(value).__module__}.{kind}" if kind == "ndarray" else f"{kind} {value!r:.40}"
