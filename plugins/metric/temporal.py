"""Temporal consistency and amount of motion.

Consistency is the cosine similarity of features of consecutive frames; network=clip gives the score
of Esser et al. 2023 (2302.03011) and Wu et al. 2023 (2212.11565). A static clip scores 1: compare
it together with the flow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.feature_networks import Features
from plugins._blocks.metrics import ClipMetric
from plugins._configs.features import NETWORKS, score_note, weights_file, weights_problems
from sandbox.contracts import Clip, ConfigError, MetricConfig, in_range, one_of
from sandbox.registry import register

SIDE = 64  # pixels: smaller frames are enlarged, because DIS works on patches of 8


@register("metric", "temporal")
class Temporal(ClipMetric):
    """Feature consistency between frames, and magnitude of optical flow (OpenCV)."""

    @dataclass
    class Config(MetricConfig):
        """network: an image network of plugins/_configs/features.py; weights: "hub", a file, a name
        on the hub (clip), or "random" (for tests). flow: whether to measure optical flow.
        """

        network: str = "random2d"
        weights: str = "random"
        flow: bool = True

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            of_images = [n for n, of_clips in NETWORKS.items() if not of_clips]
            yield from one_of("network", self.network, of_images)
            if self.network in of_images:
                yield from weights_problems(self.network, self.weights)

        def files(self) -> dict[str, str | None]:
            return weights_file(self.network, self.weights)

        def accepts(self, clip: Clip) -> Iterator[str]:
            yield from in_range("frames", clip.frames, 2)

        def fit_clips(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.features = Features(cfg.network, cfg.weights, "metric.weights")
        if cfg.flow:
            _cv2()

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        video = video.float().nan_to_num().clamp(-1, 1)
        features = F.normalize(self.features(video), dim=-1)  # (N, T, D)
        scores = {"consistency": (features[:, 1:] * features[:, :-1]).sum(-1).mean(1)}
        if self.cfg.flow:
            scores["flow"] = torch.tensor([magnitude(clip) for clip in video])
        return scores

    def meaning(self) -> dict[str, str]:
        network = f"{self.cfg.network}{score_note(self.cfg.weights)}"
        meaning = {"consistency": f"cosine of consecutive frames in {network}; static 1"}
        if self.cfg.flow:
            meaning["flow"] = "mean optical flow in pixels per frame; compare with real"
        return meaning


def magnitude(clip: Tensor) -> float:
    """Mean optical flow between frames of (3, T, H, W) in [-1, 1], in pixels of the clip.

    Dense inverse search, Kroeger et al. 2016 (1603.03590), preset medium.
    """
    cv2 = _cv2()
    height, width = clip.shape[2:]
    factor = max(1, -(-SIDE // min(height, width)))
    pixels = ((clip.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
    greys = [
        cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (width * factor, height * factor),
                   interpolation=cv2.INTER_CUBIC)
        for frame in pixels
    ]  # fmt: skip
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [search.calc(a, b, None) for a, b in pairwise(greys)]
    return float(np.mean([np.linalg.norm(flow, axis=-1).mean() for flow in flows])) / factor


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as e:
        raise ConfigError(
            "metric.flow=true: needs OpenCV; install the extra prep, or set metric.flow=false"
        ) from e
    return cv2
