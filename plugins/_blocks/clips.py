"""Finding and reading the clips of a folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from plugins._blocks.folders import Unused, file_identity, files_below
from plugins._blocks.video_io import CONTAINERS, IMAGES, Fit, chooser, read_image, read_video
from sandbox.contracts import Sample


def usable_endings(frames: int) -> tuple[str, ...]:
    """Endings of the files that can give a clip of `frames` frames."""
    return (*CONTAINERS, *(IMAGES if frames == 1 else ()))


def clip_files(root: Path, frames: int, unused: Unused) -> tuple[list[str], list[str]]:
    """Sorted names of the files below `root` that can give clips, and those of other files.

    Names have "/" between folders; links are followed. A file with several names counts once, so it
    cannot be in both splits. Counts other names, and images that are too short, in `unused`.
    """
    usable = usable_endings(frames)
    names: list[str] = []
    others: list[str] = []
    seen: set[object] = set()
    for name in sorted(files_below(root)):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in usable:
            if (identity := file_identity(root / name)) in seen:
                unused.add("second names of a file")
            else:
                seen.add(identity)
                names.append(name)
        elif suffix in IMAGES:
            unused.add(f"images, because data.frames={frames}")
        else:
            others.append(name)
    return names, others


def read_clip(path: Path, cfg: Any, training: bool, rng: np.random.Generator) -> Sample:
    """A clip of a video or image file, "video" and its rates; raises BadItem.

    cfg: a DataConfig with `stride`, and "random" or "centre" as `start` and `crop`, which hold in
    training.
    """
    fit = Fit(cfg.height, cfg.width, chooser(training and cfg.crop == "random", rng))
    if path.suffix.lower() in IMAGES:
        return {"video": read_image(path, fit)}
    start = chooser(training and cfg.start == "random", rng)
    video, rate = read_video(path, cfg.frames, cfg.stride, start, fit)
    if cfg.frames == 1:
        return {"video": video}
    rates = {"fps": rate / cfg.stride, "frame_stride": float(cfg.stride)}
    return {"video": video, **rates}
