"""How much of the picture is writing: boxes around text, found by rapidocr, over the whole area.

EasyAnimate drops clips whose middle frame has more than 2 % of it (its code; its article says 1).
It counts whatever looks like writing. Soft blobs all over the picture do, too; so here a box counts
only where rapidocr also reads something in it, unless read=false.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sandbox.contracts import Row, StageConfig, VideoClip, in_range
from sandbox.registry import register


@register("stage", "text_area")
class TextArea:
    """Drops clips with much writing in the picture: subtitles, logos, credits."""

    @dataclass
    class Config(StageConfig):
        """frames: so many are looked at, evenly spread (1: the middle one), and the most counts.

        side: pixels to which a longer side is scaled first; max: largest part of the picture.
        read: boxes count where something can be read in them (Chinese, Latin letters, digits) with
        `confidence`; false counts all, as published, and finds other scripts.
        """

        frames: int = 1
        side: int = 736
        read: bool = True
        confidence: float = 0.7
        max: float = 0.02

        limits: ClassVar[tuple[str, ...]] = ("max",)
        distributions: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime")

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("frames", self.frames, 1)
            yield from in_range("side", self.side, 64)
            yield from in_range("confidence", self.confidence, 0, 1)
            yield from in_range("max", self.max, 0, 1)

        def times(self, seconds: float) -> list[float]:
            return [round((i + 0.5) / self.frames * seconds, 6) for i in range(self.frames)]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.finder: Any = None

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """{"area": part of the picture in [0, 1]}."""
        areas = [self.area(image) for image in clip.at(self.cfg.times(clip.seconds))]
        return {"area": round(max(areas), 5)}

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        areas = [row["scores"]["text_area"]["area"] for row in rows]
        limit = self.cfg.max
        return [{"drop": f"area {a:.3f} > max={limit:g}"} if a > limit else {} for a in areas]

    def area(self, image: np.ndarray) -> float:
        """Of all boxes together; where they overlap it counts once."""
        import cv2

        bgr = np.ascontiguousarray(image[..., ::-1])
        found = self._finder()(bgr, use_det=True, use_cls=False, use_rec=self.cfg.read)
        if found.boxes is None or not len(found.boxes):
            return 0.0
        covered = np.zeros(image.shape[:2], np.uint8)
        for box in np.asarray(found.boxes):
            cv2.fillPoly(covered, [box.round().astype(np.int32)], 1)
        return float(covered.mean())

    def _finder(self) -> Any:
        if self.finder is None:
            from rapidocr import RapidOCR

            threads = "EngineConfig.onnxruntime.{}_op_num_threads"
            settings = {
                "Global.log_level": "critical",
                "Global.text_score": self.cfg.confidence,
                "Det.limit_type": "max",
                "Det.limit_side_len": self.cfg.side,
                threads.format("intra"): 1,  # clips are the parallelism
                threads.format("inter"): 1,
            }
            self.finder = RapidOCR(params=settings)
        return self.finder
