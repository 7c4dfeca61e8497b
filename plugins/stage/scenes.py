"""Scene cuts as in EasyAnimate: several of PySceneDetect's content detectors.

Detectors with different thresholds and frame skips find different kinds of cuts; a cut of any of
them counts. All run in one pass over the file. A detector that skips frames reports a cut late:
unlike the published code, we move it to the frame with the largest change among the skipped ones,
so that no clip ends with a frame of the next scene.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from sandbox.contracts import Footage, Span, StageConfig, in_range, same_length
from sandbox.registry import register

WIDTH = 256  # pixels; PySceneDetect itself downscales wider frames to it
RATE = 30.0  # arbitrary: detectors count frames


@register("stage", "scenes")
class Scenes:
    """Cuts files at scene changes, and into pieces of a few seconds."""

    @dataclass
    class Config(StageConfig):
        """thresholds, frame_skips: one per detector; a skip of 1 uses every second frame.

        min_scene_frames: least distance between two cuts of a detector. max_seconds: longer scenes
        are cut into pieces of this length; min_seconds: shorter pieces are dropped.
        """

        thresholds: tuple[float, ...] = (10.0, 20.0, 30.0)
        frame_skips: tuple[int, ...] = (0, 1, 2)
        min_scene_frames: int = 10
        min_seconds: float = 3.0
        max_seconds: float = 10.0

        limits: ClassVar[tuple[str, ...]] = ("min_seconds", "max_seconds")
        distributions: ClassVar[tuple[str, ...]] = (
            "scenedetect-headless",
            "opencv-python-headless",
        )

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for threshold in self.thresholds:
                yield from in_range("thresholds", threshold, 0, 255)
            for skip in self.frame_skips:
                yield from in_range("frame_skips", skip, 0)
            yield from same_length(
                "frame_skips", self.frame_skips, len(self.thresholds), "threshold"
            )
            yield from in_range("min_scene_frames", self.min_scene_frames, 1)
            yield from in_range("min_seconds", self.min_seconds, 0, 1e6)
            yield from in_range("max_seconds", self.max_seconds, 0.04, 1e6)
            if self.max_seconds < self.min_seconds:
                yield f"max_seconds={self.max_seconds}: want >= {self.min_seconds}"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def look(self, clip: Footage) -> dict[str, Any]:
        """{"cuts": time in seconds of the first frame after each cut}."""
        import cv2
        from scenedetect import FrameTimecode
        from scenedetect.detectors import ContentDetector

        pairs = zip(self.cfg.thresholds, self.cfg.frame_skips, strict=True)
        detectors = [(ContentDetector(t, self.cfg.min_scene_frames), skip) for t, skip in pairs]
        times: list[float] = []
        changes: list[float] = []  # mean absolute difference to the previous frame
        cuts: set[int] = set()
        previous: np.ndarray | None = None
        for number, (time, image) in enumerate(clip.stream(WIDTH)):
            times.append(time)
            bgr = np.ascontiguousarray(image[..., ::-1])
            changes.append(0.0 if previous is None else float(cv2.absdiff(bgr, previous).mean()))
            previous = bgr
            for detector, skip in detectors:
                if number % (skip + 1) == 0:
                    code = FrameTimecode(number, RATE)
                    late = [c.frame_num for c in detector.process_frame(code, bgr)]
                    cuts |= {largest_change(changes, n - skip, n) for n in late}
        return {"cuts": [times[n] for n in sorted(cuts - {0})]}

    def spans(self, scores: dict[str, Any], seconds: float) -> list[Span]:
        cuts = [0.0, *scores["cuts"], seconds]
        return [span for start, end in pairwise(cuts) for span in self._pieces(start, end)]

    def _pieces(self, start: float, end: float) -> Iterator[Span]:
        while end - start > 1e-6:
            stop = min(end, round(start + self.cfg.max_seconds, 6))
            # tolerates rounded times
            is_short = stop - start < self.cfg.min_seconds - 1e-3
            why = f"{stop - start:.2f} s < min_seconds={self.cfg.min_seconds:g}" if is_short else ""
            yield start, stop, why
            start = stop


def largest_change(changes: list[float], first: int, last: int) -> int:
    """Number of the frame in [first, last] that differs most from the previous one."""
    return max(range(max(first, 0), last + 1), key=lambda n: changes[n])
