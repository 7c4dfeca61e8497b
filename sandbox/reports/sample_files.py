"""Files of samples: a clip for each caption, a contact sheet, and a record of what made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sandbox.config.secrets import mask
from sandbox.reports import media
from sandbox.storage.atomic import claimed, storing, write_atomic

if TYPE_CHECKING:
    pass


RECORD = "samples.json"  # beside clips for prompts: what made them
FPS = 8.0  # of sample videos where the data name none


def write_clips(
    folder: Path,
    captions: Sequence[str],
    video: Tensor,
    fps: float = FPS,
    given: Tensor | None = None,
) -> list[Path]:
    """An mp4 for each clip (N, 3, T, H, W), a PNG where T is 1; last the contact sheet of all.

    given: images that the model was told (N, 3, K, H, W), which the sheet shows before the clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (caption, clip) in enumerate(zip(captions, video, strict=True)):
        path = folder / f"{i:03}-{file_name(caption)}"
        if clip.shape[1] == 1:
            paths.append(path.with_suffix(".png"))
            media.write_picture(paths[-1], clip)
        else:
            paths.append(path.with_suffix(".mp4"))
            media.write_video(paths[-1], clip, fps, media.enlargement(*clip.shape[2:]))
    sheet = folder / "sheet.png"
    columns = {"sample": video} if given is None else {"given": given, "sample": video}
    rows = [media.Row(c, {k: v[i] for k, v in columns.items()}) for i, c in enumerate(captions)]
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
    """`write_clips`, and beside them the settings that made them: seed, step, sampler, ...

    Where `folder` has those of another call, into the next one that has none: `folder`-2, ...
    Raises StorageError.
    """
    folders = chain([folder], (Path(f"{folder}-{number}") for number in count(2)))
    record = claimed(own / RECORD for own in folders)
    paths = write_clips(record.parent, captions, video, fps, given)
    clips = {path.name: caption for path, caption in zip(paths, captions, strict=False)}
    with storing(record):
        write_atomic(record, json.dumps(mask(made_by) | {"clips": clips}, indent=1) + "\n")
    return paths


def file_name(caption: str) -> str:
    """A caption as part of a file's name: letters, digits and dashes, at most 60."""
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in caption.lower())
    return "-".join(w for w in words.split("-") if w)[:60] or "clip"
