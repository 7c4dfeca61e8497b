"""Which size a clip goes to, by aspect ratio and number of frames, as EasyAnimate (June 2024) does.

Pure functions; sizes are (height, width) in pixels, ratios height over width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import TypeVar

from sandbox.contracts import Clip

Size = tuple[int, int]
T = TypeVar("T")


def nearest_ratio(size: Size, ratios: Iterable[float]) -> float:
    """The ratio nearest to that of `size`; the first of two equally near."""
    height, width = size
    return min(ratios, key=lambda ratio: abs(ratio - height / width))


def covering(source: Size, crop: Size) -> Size:
    """The size to which a picture is resized, so that it is just large enough for `crop`."""
    (height, width), (rows, columns) = source, crop
    if rows / height > columns / width:
        return rows, int(width * rows / height)
    return int(height * columns / width), columns


def frame_shares(frames: int, interval: int) -> dict[int, float]:
    """How often a random crop in time leaves so many of `frames` frames; sums to 1.

    1 and the multiples of `interval`: the most of them nine times in ten, the others share the rest
    alike. Raises ValueError for numbers below 1.
    """
    if frames < 1 or interval < 1:
        raise ValueError(f"frames={frames}, interval={interval}: want both >= 1")
    choices = list(dict.fromkeys((1, *range(interval, frames + 1, interval))))
    if len(choices) == 1:
        return {1: 1.0}
    *fewer, most = choices
    return dict.fromkeys(fewer, 0.1 / len(fewer)) | {most: 0.9}


def picked(shares: Mapping[T, float], u: float) -> T:
    """The entry at `u` in [0, 1), for a uniform number; shares need not sum to 1."""
    rest = u * sum(shares.values())
    for choice, share in shares.items():
        rest -= share
        if rest < 0:
            return choice
    return choice


def batch_frames(lengths: Sequence[int], interval: int, most: int) -> int:
    """Frames of a batch of clips with these `lengths`.

    The largest multiple of `interval` that none falls short of, and at most `most` + `interval`;
    where that is none, 1: a batch of pictures.
    """
    length = min([*lengths, most + interval])
    return max(length // interval * interval, 1)


def nearest(look: tuple[int, int, int], clips: Sequence[Clip]) -> Clip:
    """The one of `clips` for a video of these frames, height and width; the first of equals."""
    number, height, width = look
    counts = {clip.frames for clip in clips}
    frames = max((n for n in counts if n <= number), default=min(counts))

    def distance(clip: Clip) -> tuple[float, int]:
        aspects = abs(log(clip.height * width / (clip.width * height)))
        return aspects, abs(clip.height - height) + abs(clip.width - width)

    return min((clip for clip in clips if clip.frames == frames), key=distance)
