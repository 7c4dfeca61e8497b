"""Duplicate detection by a perceptual hash of some frames and their mean colours.

The hash is the signs of the low frequencies of a small grey image (Zauner 2010, section 3.2.1). It
is invariant to scaling, re-encoding and small changes of brightness. Grey images have no colour, so
mean colours are compared too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plugins._configs.stages import SampledFramesConfig
from sandbox.contracts import Footage, Row, in_range
from sandbox.registry import register

SIDE, LOW = 32, 8  # side of the small image in pixels, frequencies kept per axis
FLAT = 1.0  # images with a smaller standard deviation (of 255) have no meaningful signs


@register("stage", "duplicates")
class Duplicates:
    """Drops exact and near duplicates, keeping one clip of each group."""

    @dataclass
    class Config(SampledFramesConfig):
        """frames: number of evenly spaced frames to compare.

        Largest differences between duplicates: bits of the 64-bit hash (mean over frames), mean
        colour (levels of 255) and length in seconds. The clip with the most pixels is kept, of
        several the first.
        """

        frames: int = 4
        bits: float = 6.0
        colour: float = 24.0
        seconds: float = 0.5

        limits: ClassVar[tuple[str, ...]] = ("bits", "colour", "seconds")
        distributions: ClassVar[tuple[str, ...]] = ("opencv-python-headless",)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("frames", self.frames, 1)
            yield from in_range("bits", self.bits, 0, 64)
            yield from in_range("colour", self.colour, 0, 255)
            yield from in_range("seconds", self.seconds, 0)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def look(self, clip: Footage) -> dict[str, Any]:
        """Per frame: {"hashes": 16 hexadecimal digits, "colours": mean levels of R, G, B}."""
        images = clip.at(self.cfg.times(clip.seconds))
        return {
            "hashes": [perceptual_hash(x) for x in images],
            "colours": [np.round(x.mean((0, 1)), 1).tolist() for x in images],
        }

    def judge(self, rows: list[Row]) -> list[dict[str, Any]]:
        verdicts: list[dict[str, Any]] = [{} for _ in rows]
        if not rows:
            return verdicts
        scores = [row["scores"]["duplicates"] for row in rows]
        hashes = np.array([[int(h, 16) for h in s["hashes"]] for s in scores], np.uint64)
        colours = np.array([s["colours"] for s in scores], np.float32)
        lengths = np.array([r["end"] - r["start"] for r in rows])
        pixels = np.array([r["info"].width * r["info"].height for r in rows])
        kept = np.empty(len(rows), np.intp)  # indices of the kept clips
        count = 0
        for i in np.argsort(-pixels, kind="stable"):
            others = kept[:count]
            same = np.bitwise_count(hashes[others] ^ hashes[i]).mean(1) <= self.cfg.bits
            same &= np.abs(colours[others] - colours[i]).mean((1, 2)) <= self.cfg.colour
            same &= np.abs(lengths[others] - lengths[i]) <= self.cfg.seconds
            if same.any():
                first = rows[others[int(np.argmax(same))]]
                where = f"{first['source']} at {first['start']:.2f} s"
                verdicts[i] = {"drop": f"duplicate of {where}", "same_as": first["id"]}
            else:
                kept[count] = i
                count += 1
        return verdicts


def perceptual_hash(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> 16 hexadecimal digits; zeros for an image of one colour."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < FLAT:
        return "0" * 16
    low = cv2.dct(small)[:LOW, :LOW].ravel()
    signs = low > np.median(low[1:])  # the first is the mean
    return f"{int.from_bytes(np.packbits(signs).tobytes()):016x}"
