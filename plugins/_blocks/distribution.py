"""Base class of metrics that compare the features of generated clips with those of real clips."""

from typing import Any

import torch
from torch import Tensor

from plugins._blocks.feature_networks import Features
from plugins._blocks.metrics import PlainMetric


class DistributionMetric(PlainMetric):
    """A distance between two sets of feature rows; `score` is a subclass's."""

    kind: str  # start of the score's name: "frechet" gives frechet_video or frechet_image

    def __init__(self, cfg: Any) -> None:
        """`cfg` is a DistributionConfig."""
        self.cfg = cfg
        self.features = Features(cfg.network, cfg.weights, "metric.weights")
        self.name = f"{self.kind}_{'video' if self.features.of_clips else 'image'}"

    def rows(self, video: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (rows, D), one row per clip or frame."""
        frames = video.shape[2]
        if not self.features.of_clips and self.cfg.frames and self.cfg.frames < frames:
            video = video[:, :, torch.linspace(0, frames - 1, self.cfg.frames).round().long()]
        features = self.features(video.clamp(-1, 1).float().nan_to_num())
        return features if self.features.of_clips else features.flatten(0, 1)
