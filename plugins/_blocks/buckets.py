"""Bucket choice by aspect ratio and number of frames, as in EasyAnimate (June 2024).

Pure functions; sizes are (height, width) in pixels, ratios are height over width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import TypeVar

from sandbox.contracts import Clip

Size = tuple[int, int]
T = TypeVar("T")


def nearest_ratio(size: Size, ratios: Iterable[float]) -> float:
    """The ratio nearest to that of `size`; of equally near ones the first."""
    height, width = size
    return min(ratios, key=lambda ratio: abs(ratio - height / width))


def covering_size(source: Size, crop: Size) -> Size:
    """The smallest resize of `source` that keeps its aspect and covers `crop`."""
    (height, width), (rows, columns) = source, crop
    if rows / height > columns / width:
        return rows, int(width * rows / height)
    return int(height * columns / width), columns


def frame_shares(frames: int, interval: int) -> dict[int, float]:
    """Probability of each clip length under a random temporal crop of `frames` frames.

    Lengths are 1 and the multiples of `interval`. The longest has probability 0.9; the others
    share the rest equally. Raises ValueError for numbers below 1.
    """
    if frames < 1 or interval < 1:
        raise ValueError(f"frames={frames}, interval={interval}: want both >= 1")
    choices = list(dict.fromkeys((1, *range(interval, frames + 1, interval))))
    if len(choices) == 1:
        return {1: 1.0}
    *fewer, most = choices
    return dict.fromkeys(fewer, 0.1 / len(fewer)) | {most: 0.9}


def pick_by_share(shares: Mapping[T, float], u: float) -> T:
    """The entry that uniform `u` in [0, 1) selects; shares need not sum to 1."""
    remaining = u * sum(shares.values())
    for choice, share in shares.items():
        remaining -= share
        if remaining < 0:
            return choice
    return list(shares)[-1]  # rounding


def batch_frames(lengths: Sequence[int], interval: int, most: int) -> int:
    """Number of frames of a batch of clips with these `lengths`.

    The largest multiple of `interval` that no clip falls short of, and at most `most` + `interval`;
    1 (a batch of images) if there is none.
    """
    length = min([*lengths, most + interval])
    return max(length // interval * interval, 1)


def nearest(size: tuple[int, int, int], clips: Sequence[Clip]) -> Clip:
    """The bucket among `clips` for a video of (frames, height, width); of equals the first.

    The most frames that the video has (else the fewest), then the nearest aspect, then the nearest
    size in pixels.
    """
    number, height, width = size
    counts = {clip.frames for clip in clips}
    frames = max((n for n in counts if n <= number), default=min(counts))

    def distance(clip: Clip) -> tuple[float, int]:
        aspects = abs(log(clip.height * width / (clip.width * height)))
        return aspects, abs(clip.height - height) + abs(clip.width - width)

    return min((clip for clip in clips if clip.frames == frames), key=distance)
