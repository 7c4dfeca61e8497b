"""Config of data with several clip sizes (EasyAnimate); ratios are height over width."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import Clip, DataConfig, in_range, same_length

# EasyAnimate's (June 2024) sizes by ratio, which are PixArt-alpha's at 512 pixels (Chen et al.
# 2023, 2310.00426).
BASE = 512  # side of a square in the tables; other sizes are scaled
ASPECTS: dict[float, tuple[int, int]] = {
    0.25: (256, 1024), 0.26: (256, 992), 0.27: (256, 960), 0.28: (256, 928), 0.32: (288, 896),
    0.33: (288, 864), 0.35: (288, 832), 0.4: (320, 800), 0.42: (320, 768), 0.48: (352, 736),
    0.5: (352, 704), 0.52: (352, 672), 0.57: (384, 672), 0.6: (384, 640), 0.68: (416, 608),
    0.72: (416, 576), 0.78: (448, 576), 0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512),
    1.0: (512, 512), 1.07: (512, 480), 1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448),
    1.38: (576, 416), 1.46: (608, 416), 1.67: (640, 384), 1.75: (672, 384), 2.0: (704, 352),
    2.09: (736, 352), 2.4: (768, 320), 2.5: (800, 320), 2.89: (832, 288), 3.0: (864, 288),
    3.11: (896, 288), 3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256), 4.0: (1024, 256),
}  # fmt: skip
# Ratios of a random crop and their relative frequencies.
CROPS: dict[float, int] = {
    0.42: 1, 0.5: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.0: 8, 1.07: 8, 1.13: 4,
    1.29: 4, 1.46: 4, 1.75: 4, 2.0: 2, 2.4: 1,
}  # fmt: skip


def crop_size(ratio: float, size: int) -> tuple[int, int]:
    """Height and width of the bucket `ratio`, scaled so that a square is `size` x `size` pixels.

    Raises ValueError for an unknown ratio.
    """
    if ratio not in ASPECTS:
        raise ValueError(f"ratio={ratio}: want one of {list(ASPECTS)}")
    height, width = ASPECTS[ratio]
    return int(height / BASE * size), int(width / BASE * size)


@dataclass
class BucketedDataConfig(DataConfig):
    """Data with several clip sizes; each batch has one of them.

    buckets: sizes in addition to frames x height x width, such as 49x720x480; bucket_batch_sizes:
    clips per process and micro-batch, one number per bucket (empty: batch_size).
    """

    buckets: tuple[str, ...] = ()
    bucket_batch_sizes: tuple[int, ...] = ()

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for text in self.buckets:
            if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
                yield f"buckets={text!r}: want frames x height x width, such as 49x720x480"
        if self.bucket_batch_sizes:
            sizes, count = self.bucket_batch_sizes, len(self.buckets)
            yield from same_length("bucket_batch_sizes", sizes, count, "entry of buckets")
            yield from in_range("bucket_batch_sizes", min(sizes), 1)

    def clips(self) -> tuple[Clip, ...]:
        return tuple(dict.fromkeys((*super().clips(), *map(parse_bucket, self.buckets))))

    def batch_of(self, clip: Clip) -> int:
        sizes = dict(zip(map(parse_bucket, self.buckets), self.bucket_batch_sizes, strict=False))
        return sizes.get(clip, self.batch_size)


def parse_bucket(text: str) -> Clip:
    """ "49x720x480" -> Clip of these frames, height and width."""
    return Clip(3, *map(int, text.split("x")))
