"""How steady clips are and how much they move.

Consistency is the cosine of the features of consecutive frames, with network=clip as in Esser et
al. 2023 (2302.03011) and Wu et al. 2023 (2212.11565). A still clip has 1: read it beside the flow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.features import Features
from plugins._configs.features import NETWORKS, weights_file, weights_problems
from sandbox.contracts import Clip, ConfigError, MetricConfig, in_range, one_of
from sandbox.registry import register

SIDE = 64  # pixels: smaller frames are enlarged, since the flow is found in patches of 8


@register("metric", "temporal")
class Temporal:
    """Consistency of features between frames, and magnitude of optical flow (OpenCV)."""

    @dataclass
    class Config(MetricConfig):
        """network: of pictures, of plugins/_configs/features.py; weights: "hub", a file, a name on
        the hub (clip), or "random" (for tests). flow: also measures how far pixels move.
        """

        network: str = "random2d"
        weights: str = "random"
        flow: bool = True

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            pictures = [n for n, of_clips in NETWORKS.items() if not of_clips]
            yield from one_of("network", self.network, pictures)
            if self.network in pictures:
                yield from weights_problems(self.network, self.weights)

        def files(self) -> dict[str, str | None]:
            return weights_file(self.network, self.weights)

        def accepts(self, clip: Clip) -> Iterator[str]:
            yield from in_range("frames", clip.frames, 2)

        def learns_from(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.features = Features(cfg.network, cfg.weights, "metric.weights")
        if cfg.flow:
            _cv2()

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """There is nothing to learn."""

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        return {k: v.mean().item() for k, v in self.per_clip(video, captions).items()}

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        video = video.float().nan_to_num().clamp(-1, 1)
        seen = F.normalize(self.features(video), dim=-1)  # (N, T, D)
        found = {"consistency": (seen[:, 1:] * seen[:, :-1]).sum(-1).mean(1)}
        if self.cfg.flow:
            found["flow"] = torch.tensor([magnitude(clip) for clip in video])
        return found

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def proportions(self) -> frozenset[str]:
        return frozenset()

    def meaning(self) -> dict[str, str]:
        known = " (random: tells little)" if self.cfg.weights == "random" else ""
        network = f"cosine of frames that follow each other in {self.cfg.network}{known}"
        found = {"consistency": f"{network}; still 1"}
        if self.cfg.flow:
            found["flow"] = "optical flow, pixels a frame, mean of all pixels; compare with real"
        return found


def magnitude(clip: Tensor) -> float:
    """Mean length of the flow between frames of (3, T, H, W) in [-1, 1], in its pixels.

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
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [search.calc(a, b, None) for a, b in pairwise(greys)]
    return float(np.mean([np.linalg.norm(flow, axis=-1).mean() for flow in flows])) / factor


def _cv2():
    try:
        import cv2
    except ImportError as e:
        raise ConfigError(
            "metric.flow=true: needs OpenCV; install the extra prep, or use metric.flow=false"
        ) from e
    return cv2
