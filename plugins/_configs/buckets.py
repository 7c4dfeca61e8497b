"""What the Configs of data in several sizes share; ratios are height over width."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.contracts import Clip, DataConfig, in_range, same_length

# Sizes by ratio of EasyAnimate (June 2024), which are those of PixArt-alpha at 512 pixels (Chen et
# al. 2023, 2310.00426).
BASE = 512  # pixels that the tables are for; other sizes are scaled
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
# Ratios of a random crop and how often each is taken, in shares of their sum.
CROPS: dict[float, int] = {
    0.42: 1, 0.5: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.0: 8, 1.07: 8, 1.13: 4,
    1.29: 4, 1.46: 4, 1.75: 4, 2.0: 2, 2.4: 1,
}  # fmt: skip


def crop_size(ratio: float, size: int) -> tuple[int, int]:
    """Height and width of the bucket `ratio` where a square has `size` pixels a side.

    Raises ValueError for an unknown ratio.
    """
    if ratio not in ASPECTS:
        raise ValueError(f"ratio={ratio}: want one of {list(ASPECTS)}")
    height, width = ASPECTS[ratio]
    return int(height / BASE * size), int(width / BASE * size)


@dataclass
class BucketedDataConfig(DataConfig):
    """Data whose batches have one of several sizes each.

    buckets: sizes beside frames x height x width, such as 49x720x480; bucket_batch_sizes: clips per
    process and micro-batch of each of them; empty: batch_size.
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
        further = (Clip(3, *map(int, text.split("x"))) for text in self.buckets)
        return tuple(dict.fromkeys((*super().clips(), *further)))

    def batch_of(self, clip: Clip) -> int:
        given = zip(self.buckets, self.bucket_batch_sizes, strict=False)
        sizes = {Clip(3, *map(int, text.split("x"))): size for text, size in given}
        return sizes.get(clip, self.batch_size)
