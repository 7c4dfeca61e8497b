"""Sizes of batches by aspect ratio and number of frames, as EasyAnimate trains (June 2024).

A clip goes to the size whose ratio is nearest, is resized to cover it and cropped in the middle;
batches have one size. Pure functions; sizes are (height, width) in pixels. Tables of published
sizes are those of PixArt-alpha at 512 pixels (Chen et al. 2023, 2310.00426).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Size = tuple[int, int]
T = TypeVar("T")

BASE = 512  # pixels that the tables are for; other sizes are scaled
ASPECTS: dict[float, Size] = {
    0.25: (256, 1024), 0.26: (256, 992), 0.27: (256, 960), 0.28: (256, 928), 0.32: (288, 896),
    0.33: (288, 864), 0.35: (288, 832), 0.4: (320, 800), 0.42: (320, 768), 0.48: (352, 736),
    0.5: (352, 704), 0.52: (352, 672), 0.57: (384, 672), 0.6: (384, 640), 0.68: (416, 608),
    0.72: (416, 576), 0.78: (448, 576), 0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512),
    1.0: (512, 512), 1.07: (512, 480), 1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448),
    1.38: (576, 416), 1.46: (608, 416), 1.67: (640, 384), 1.75: (672, 384), 2.0: (704, 352),
    2.09: (736, 352), 2.4: (768, 320), 2.5: (800, 320), 2.89: (832, 288), 3.0: (864, 288),
    3.11: (896, 288), 3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256), 4.0: (1024, 256),
}  # fmt: skip
# Ratios of a random crop and how often each is taken, in shares of their sum.
CROPS: dict[float, int] = {
    0.42: 1, 0.5: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.0: 8, 1.07: 8, 1.13: 4,
    1.29: 4, 1.46: 4, 1.75: 4, 2.0: 2, 2.4: 1,
}  # fmt: skip


def nearest_ratio(size: Size, ratios: Iterable[float] = ASPECTS) -> float:
    """The ratio, height over width, nearest to that of `size`; the first of two equally near."""
    height, width = size
    return min(ratios, key=lambda ratio: abs(ratio - height / width))


def crop_size(ratio: float, size: int) -> Size:
    """Height and width of the bucket `ratio` where a square has `size` pixels a side.

    Raises ValueError for an unknown ratio.
    """
    if ratio not in ASPECTS:
        raise ValueError(f"ratio={ratio}: want one of {list(ASPECTS)}")
    height, width = ASPECTS[ratio]
    return int(height / BASE * size), int(width / BASE * size)


def covering(source: Size, crop: Size) -> Size:
    """The size to which a picture is resized, so that it is just large enough for `crop`."""
    (height, width), (rows, columns) = source, crop
    if rows / height > columns / width:
        return rows, int(width * rows / height)
    return int(height * columns / width), columns


def ratio_shares() -> dict[float, float]:
    """How often a random crop takes each ratio; sums to 1."""
    total = sum(CROPS.values())
    return {ratio: weight / total for ratio, weight in CROPS.items()}


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


def picked(shares: dict[T, float], u: float) -> T:
    """The entry at `u` in [0, 1), for a uniform number."""
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


def gathered(keys: Iterable[Hashable], batch_size: int) -> Iterator[list[int]]:
    """Places in `keys` of the items of each batch, in the order in which batches become full.

    All items of a batch have one key, such as (kind, ratio). Items that fill no batch are left out.
    """
    waiting: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        queue = waiting.setdefault(key, [])
        queue.append(place)
        if len(queue) == batch_size:
            yield waiting.pop(key)
