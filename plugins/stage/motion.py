"""Amount of motion: mean magnitude of optical flow between sampled frames.

As published for EasyAnimate: two frames per second, OpenCV's Farneback method, kept between 3 and 8
pixels. DIS is OpenCV's faster and more accurate method, RAFT is torchvision's network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sandbox.contracts import Row, StageConfig, VideoClip, above, in_range, one_of
from sandbox.registry import register

METHODS = ("farneback", "dis", "raft")


@register("stage", "motion")
class Motion:
    """Drops clips with too little or too much motion, by optical flow."""

    @dataclass
    class Config(StageConfig):
        """method: farneback, dis, or raft with `weights`, a file of torchvision's raft_large.

        fps: sampling rate of the frames between which flow is measured; short_side: frames with a
        longer short side are downscaled to it (pixels; null: never, as published). min, max: range
        of kept scores, in pixels between two sampled frames; null for no limit.
        """

        method: str = "farneback"
        fps: float = 2.0
        short_side: int | None = None
        weights: str | None = None
        min: float | None = 3.0
        max: float | None = 8.0

        limits: ClassVar[tuple[str, ...]] = ("min", "max")
        distributions: ClassVar[tuple[str, ...]] = ("opencv-python-headless",)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("method", self.method, METHODS)
            yield from above("fps", self.fps, 0, 240)
            yield from in_range("short_side", self.short_side, 16)
            yield from in_range("min", self.min, 0)
            yield from in_range("max", self.max, 0)
            if self.method == "raft" and self.weights is None:
                yield "weights=null: want a file of torchvision's raft_large for method=raft"

        def files(self) -> dict[str, str | None]:
            return {"weights": self.weights} if self.method == "raft" else {}

        def times(self, seconds: float) -> list[float]:
            """At `fps`, at least two."""
            count = max(2, int(seconds * self.fps + 1e-6))
            step = min(1 / self.fps, seconds / 2)
            return [round(i * step, 6) for i in range(count)]

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.network: Any = None

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """{"flow": pixels between two frames, mean over pixels and pairs of frames}."""
        images = [scale_down(x, self.cfg.short_side) for x in clip.at(self.cfg.times(clip.seconds))]
        flow = {"farneback": farneback, "dis": dis, "raft": self.raft}[self.cfg.method]
        lengths = [float(np.hypot(*np.moveaxis(flow(a, b), -1, 0)).mean())
                   for a, b in pairwise(images)]  # fmt: skip
        return {"flow": round(float(np.mean(lengths)), 4)}

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        return [self._verdict(row["scores"]["motion"]["flow"]) for row in rows]

    def _verdict(self, flow: float) -> dict[str, Any]:
        if self.cfg.min is not None and flow < self.cfg.min:
            return {"drop": f"flow {flow:.2f} < min={self.cfg.min:g}"}
        if self.cfg.max is not None and flow > self.cfg.max:
            return {"drop": f"flow {flow:.2f} > max={self.cfg.max:g}"}
        return {}

    def raft(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(H, W, 2). RAFT needs sides that are multiples of 8 and at least 128 pixels."""
        import torch
        from torch.nn.functional import interpolate

        if self.network is None:
            from torchvision.models.optical_flow import raft_large

            from plugins._blocks.state_dicts import check_values, read_file

            self.network = raft_large().eval()
            state = read_file(Path(str(self.cfg.weights)), "weights")
            check_values(f"weights={self.cfg.weights}", state)
            self.network.load_state_dict(state)
        height, width = a.shape[:2]
        to = [max(128, -(-side // 8) * 8) for side in (height, width)]
        pair = torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).float() / 127.5 - 1
        pair = interpolate(pair, to, mode="bilinear", antialias=True)
        with torch.inference_mode():
            flow = self.network(pair[:1], pair[1:])[-1][0].permute(1, 2, 0).numpy()
        return flow * np.array([width / to[1], height / to[0]], np.float32)


def scale_down(image: np.ndarray, short_side: int | None) -> np.ndarray:
    import cv2

    height, width = image.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return image
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def farneback(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(H, W, 2), with EasyAnimate's published parameters."""
    return np.asarray(
        _cv2().calcOpticalFlowFarneback(
            _grey(a), _grey(b), None, pyr_scale=0.5, levels=3, winsize=15, iterations=3,
            poly_n=5, poly_sigma=1.2, flags=0,
        )
    )  # fmt: skip


def dis(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return np.asarray(method.calc(_grey(a), _grey(b), None))


def _grey(image: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(1)  # clips are processed in parallel
    return cv2
