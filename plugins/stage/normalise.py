"""Writes clips in one format: frame rate, size, upright, square pixels, 8 bits, h264."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sandbox.contracts import Rendering, Row, StageConfig, VideoClip, above, in_range, one_of
from sandbox.registry import register

FITS = ("cover", "pad", "stretch")


@register("stage", "normalise")
class Normalise:
    """Converts clips to one frame rate, size and pixel format, and drops small and short ones."""

    @dataclass
    class Config(StageConfig):
        """fps: frame rate of the written clip; null keeps the file's. Frames are held, not blended.

        height, width: size of the written clip; null keeps the file's. short_side: instead of both,
        the shorter side in pixels, keeping the aspect. fit: for files of another aspect, "cover"
        crops, "pad" adds black, "stretch" does not keep the aspect. multiple: sides are cropped to
        multiples of it. crf: libx264's quality, 0 (best) to 51. Drops files with a side below
        min_side or an aspect (longer over shorter side) above max_aspect, and clips with fewer
        frames than min_frames.
        """

        fps: float | None = None
        height: int | None = None
        width: int | None = None
        short_side: int | None = None
        fit: str = "cover"
        multiple: int = 2
        crf: float = 18.0
        min_side: int = 0
        max_aspect: float | None = None
        min_frames: int = 2

        limits: ClassVar[tuple[str, ...]] = ("min_side", "max_aspect", "min_frames")
        distributions: ClassVar[tuple[str, ...]] = ("opencv-python-headless",)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("fps", self.fps, 0, 240)
            for name in ("height", "width", "short_side"):
                yield from in_range(name, getattr(self, name), self.multiple)
                if (getattr(self, name) or 0) % max(self.multiple, 1):
                    yield f"{name}={getattr(self, name)}: want a multiple of {self.multiple}"
            if (self.height is None) != (self.width is None):
                yield f"height={self.height}: want both height and width, or neither"
            if self.short_side is not None and self.height is not None:
                yield f"short_side={self.short_side}: want this, or height and width, not both"
            yield from one_of("fit", self.fit, FITS)
            yield from in_range("multiple", self.multiple, 2)
            if self.multiple % 2:
                yield f"multiple={self.multiple}: want an even number"
            yield from in_range("crf", self.crf, 0, 51)
            yield from in_range("min_side", self.min_side, 0)
            yield from in_range("max_aspect", self.max_aspect, 1)
            yield from in_range("min_frames", self.min_frames, 1)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        return [{"drop": why} if (why := self._why(row)) else {} for row in rows]

    def _why(self, row: Row) -> str:
        cfg, info = self.cfg, row["info"]
        short, long = sorted((info.height, info.width))
        frames = len(times(row["end"] - row["start"], cfg.fps or info.fps))
        if short < max(cfg.min_side, cfg.multiple):
            return f"side {short} < min_side={max(cfg.min_side, cfg.multiple)}"
        if cfg.max_aspect is not None and long > short * cfg.max_aspect:
            return f"aspect {long / short:.2f} > max_aspect={cfg.max_aspect:g}"
        if frames < cfg.min_frames:
            return f"{frames} frames < min_frames={cfg.min_frames}"
        return ""

    def render(self, clip: VideoClip) -> Rendering:
        fps = self.cfg.fps or clip.info.fps
        frames = clip.iter_at(times(clip.seconds, fps))
        return Rendering((self.fitted(x) for x in frames), fps, self.cfg.crf)

    def fitted(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> the written size."""
        height, width = image.shape[:2]
        to_height, to_width = self.size(height, width)
        if self.cfg.fit == "stretch" and self.cfg.height is not None:
            return resize(image, to_height, to_width)
        scales = (to_height / height, to_width / width)
        if self.cfg.fit == "pad" and self.cfg.height is not None:
            h, w = (max(1, round(side * min(scales))) for side in (height, width))
            canvas = np.zeros((to_height, to_width, 3), np.uint8)
            top, left = (to_height - h) // 2, (to_width - w) // 2
            canvas[top : top + h, left : left + w] = resize(image, h, w)
            return canvas
        # the crop, in pixels of the file
        h, w = (min(side, round(to / max(scales))) for side, to in
                ((height, to_height), (width, to_width)))  # fmt: skip
        top, left = (height - h) // 2, (width - w) // 2
        return resize(image[top : top + h, left : left + w], to_height, to_width)

    def size(self, height: int, width: int) -> tuple[int, int]:
        if self.cfg.height is not None and self.cfg.width is not None:
            return self.cfg.height, self.cfg.width
        scale = self.cfg.short_side / min(height, width) if self.cfg.short_side else 1.0
        m = self.cfg.multiple
        return max(m, round(height * scale) // m * m), max(m, round(width * scale) // m * m)


def times(seconds: float, fps: float) -> list[float]:
    """Times of the frames at `fps`; a last frame of less than 1 % of its duration is left out."""
    return [round(i / fps, 6) for i in range(max(1, int(seconds * fps + 0.01)))]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    import cv2

    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    smaller = height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=how)
