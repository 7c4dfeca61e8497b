"""Fraction of the frame covered by text: the area of rapidocr's boxes.

EasyAnimate drops clips whose middle frame has more than 2 % text (in its code; its article says 1).
It counts all detected boxes, which include soft blobs. Here a box counts only if rapidocr also
recognises text in it, unless read=false.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plugins._configs.stages import SampledFramesConfig
from sandbox.contracts import Footage, Row, in_range
from sandbox.registry import register


@register("stage", "text_area")
class TextArea:
    """Drops clips with much text in the frame: subtitles, logos, credits."""

    @dataclass
    class Config(SampledFramesConfig):
        """frames: number of evenly spaced frames (1: the middle one); the largest area counts.

        side: frames with a longer side are downscaled to it, in pixels; max: largest fraction of
        the frame that is kept. read: counts boxes with text (Chinese, Latin, digits) recognised
        with `confidence`; false counts all boxes, as published, and includes other scripts.
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

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.detector: Any = None

    def look(self, clip: Footage) -> dict[str, Any]:
        """{"area": fraction of the frame in [0, 1]}."""
        areas = [self.area(image) for image in clip.at(self.cfg.times(clip.seconds))]
        return {"area": round(max(areas), 5)}

    def judge(self, rows: list[Row]) -> list[dict[str, Any]]:
        areas = [row["scores"]["text_area"]["area"] for row in rows]
        limit = self.cfg.max
        return [{"drop": f"area {a:.3f} > max={limit:g}"} if a > limit else {} for a in areas]

    def area(self, image: np.ndarray) -> float:
        """Fraction of the image covered by the union of all boxes."""
        import cv2

        bgr = np.ascontiguousarray(image[..., ::-1])
        found = self._detector()(bgr, use_det=True, use_cls=False, use_rec=self.cfg.read)
        if found.boxes is None or not len(found.boxes):
            return 0.0
        covered = np.zeros(image.shape[:2], np.uint8)
        for box in np.asarray(found.boxes):
            cv2.fillPoly(covered, [box.round().astype(np.int32)], 1)
        return float(covered.mean())

    def _detector(self) -> Any:
        if self.detector is None:
            from rapidocr import RapidOCR

            threads = "EngineConfig.onnxruntime.{}_op_num_threads"
            settings = {
                "Global.log_level": "critical",
                "Global.text_score": self.cfg.confidence,
                "Det.limit_type": "max",
                "Det.limit_side_len": self.cfg.side,
                threads.format("intra"): 1,  # clips are processed in parallel
                threads.format("inter"): 1,
            }
            self.detector = RapidOCR(params=settings)
        return self.detector
