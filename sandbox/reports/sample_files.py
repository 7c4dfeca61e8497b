"""Sample files: a clip per caption, a contact sheet, and a record of the settings."""

import json
import logging
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.config.secrets import mask, mask_text
from sandbox.reports import media
from sandbox.storage.atomic import reserve_path, storage_errors, write_atomic

RECORD = "samples.json"  # the settings that made the clips
SHEET_ROWS = 200  # of a contact sheet
FPS = 8.0  # of sample videos where the data give none

log = logging.getLogger(__name__)


def write_clips(
    folder: Path,
    captions: Sequence[str],
    video: Tensor,
    fps: float = FPS,
    given: Tensor | None = None,
) -> list[Path]:
    """Writes an mp4 per clip (N, 3, T, H, W), or a PNG where T is 1; the last path is the sheet.

    given: conditioning images (N, 3, K, H, W), which the sheet shows before the clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (caption, clip) in enumerate(zip(captions, video, strict=True)):
        is_image = clip.shape[1] == 1
        paths.append(folder / f"{i:03}-{file_name(caption)}{'.png' if is_image else '.mp4'}")
        if is_image:
            media.write_image(paths[-1], clip)
        else:
            media.write_video(paths[-1], clip, fps, media.enlargement(*clip.shape[2:]))
    columns = {"sample": video} if given is None else {"given": given, "sample": video}
    rows = [
        (mask_text(caption), {name: clips[i] for name, clips in columns.items()})
        for i, caption in enumerate(captions[:SHEET_ROWS])
    ]
    sheet = folder / "sheet.png"
    if len(captions) > SHEET_ROWS:
        log.warning("%s shows the first %d of %d clips", sheet, SHEET_ROWS, len(captions))
    media.contact_sheet(sheet, rows)
    return [*paths, sheet]


def write_samples(
    folder: Path,
    captions: Sequence[str],
    video: Tensor,
    fps: float,
    made_by: dict[str, Any],
    given: Tensor | None = None,
) -> list[Path]:
    """`write_clips`, and samples.json with the settings: seed, step, sampler, ...

    If `folder` already has samples, writes to `folder`-2, ... Raises StorageError.
    """
    folders = chain([folder], (Path(f"{folder}-{number}") for number in count(2)))
    record = reserve_path(path / RECORD for path in folders)
    paths = write_clips(record.parent, captions, video, fps, given)
    clips = {path.name: caption for path, caption in zip(paths, captions, strict=False)}
    with storage_errors(record):
        write_atomic(record, json.dumps(mask(made_by) | {"clips": clips}, indent=1) + "\n")
    return paths


def file_name(caption: str) -> str:
    """A caption as part of a file name: letters, digits and dashes, at most 60 characters."""
    shown = mask_text(caption).lower()
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in shown)
    return "-".join(w for w in words.split("-") if w)[:60] or "clip"
