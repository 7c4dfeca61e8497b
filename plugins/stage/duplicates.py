"""Clips that show the same: a perceptual hash of some frames, and their mean colours.

A hash is the signs of the low frequencies of a small grey picture (Zauner 2010, section 3.2.1): it
stays when a clip is scaled, encoded again or made a little brighter. Grey says nothing of colour,
so that clips must agree in that, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sandbox.contracts import Row, StageConfig, VideoClip, in_range
from sandbox.registry import register

SIDE, LOW = 32, 8  # pixels of the small picture, frequencies kept of each axis
FLAT = 1.0  # of 255: what varies less has no signs to tell of


@register("stage", "duplicates")
class Duplicates:
    """Drops all but one of clips that show the same: exact copies and near ones."""

    @dataclass
    class Config(StageConfig):
        """frames: so many of a clip are compared, evenly spread.

        bits: of 64 that may differ in the mean over frames; colour: mean difference of levels of
        255 that is allowed; seconds: so much lengths may differ. The clip with the most pixels is
        kept, of several the first.
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

        def times(self, seconds: float) -> list[float]:
            return [round((i + 0.5) / self.frames * seconds, 6) for i in range(self.frames)]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """{"hashes": 16 hexadecimal digits a frame, "colours": levels of R, G, B a frame}."""
        images = clip.at(self.cfg.times(clip.seconds))
        return {
            "hashes": [perceptual_hash(x) for x in images],
            "colours": [np.round(x.mean((0, 1)), 1).tolist() for x in images],
        }

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = [{} for _ in rows]
        if not rows:
            return said
        hashes = np.array([[int(h, 16) for h in self._of(r)["hashes"]] for r in rows], np.uint64)
        colours = np.array([self._of(r)["colours"] for r in rows], np.float32)
        lengths = np.array([r["end"] - r["start"] for r in rows])
        largest = np.array([r["info"].width * r["info"].height for r in rows])
        order = np.argsort(-largest, kind="stable")
        kept = np.empty(len(rows), np.intp)  # places in `rows` of the first of each kind
        count = 0
        for i in order:
            others = kept[:count]
            apart = np.bitwise_count(hashes[others] ^ hashes[i]).mean(1)
            shade = np.abs(colours[others] - colours[i]).mean((1, 2))
            same = apart <= self.cfg.bits
            same &= shade <= self.cfg.colour
            same &= np.abs(lengths[others] - lengths[i]) <= self.cfg.seconds
            if same.any():
                first = rows[others[int(np.argmax(same))]]
                where = f"{first['source']} at {first['start']:.2f} s"
                said[i] = {"drop": f"shows the same as {where}", "same_as": first["id"]}
            else:
                kept[count] = i
                count += 1
        return said

    def _of(self, row: Row) -> dict[str, Any]:
        return row["scores"]["duplicates"]


def perceptual_hash(image: np.ndarray) -> str:
    """(H, W, 3) uint8 -> 16 hexadecimal digits; zeros for a picture of one colour."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < FLAT:
        return "0" * 16
    low = cv2.dct(small)[:LOW, :LOW].ravel()
    signs = low > np.median(low[1:])  # the first is the mean
    return f"{int.from_bytes(np.packbits(signs).tobytes()):016x}"
