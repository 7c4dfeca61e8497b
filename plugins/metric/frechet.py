"""Frechet distance of generated clips to real training clips, in the features of a network.

`network=inception_v3` gives FID (Heusel et al. 2017, 1706.08500), a video network FVD (Unterthiner
et al. 2018, 1812.01717). Both decrease with the number of clips: compare equal numbers, and take
the row of real held-out clips as the lower bound. Your own network is a TorchScript file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.feature_networks import Features
from plugins._blocks.frechet import distance, gaussian
from plugins._blocks.metrics import PlainMetric
from plugins._configs.features import NETWORKS, score_note, weights_file, weights_problems
from sandbox.contracts import MetricConfig, in_range
from sandbox.registry import register


@register("metric", "frechet")
class Frechet(PlainMetric):
    """Frechet distance to real clips: FID, FVD, or with the features of any network."""

    @dataclass
    class Config(MetricConfig):
        """network: a name in plugins/_configs/features.py. weights: "hub", a file, or "random" (for
        tests). reference: number of real training clips. frames: number of evenly spaced frames of
        each clip for an image network; null uses all.
        """

        network: str = "random3d"
        weights: str = "random"
        reference: int = 2048
        frames: int | None = 4

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from weights_problems(self.network, self.weights)
            yield from in_range("frames", self.frames, 1)
            yield from in_range("reference", self.reference, 2)

        def files(self) -> dict[str, str | None]:
            return weights_file(self.network, self.weights)

        def needs(self) -> frozenset[str]:
            return frozenset({"video"})

        def fit_clips(self) -> int:
            return self.reference

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.features = Features(cfg.network, cfg.weights, "metric.weights")
        self.name = "frechet_video" if NETWORKS[cfg.network] else "frechet_image"

    def fit(self, video: Tensor, captions: list[str]) -> None:
        self.real = gaussian(self.rows(video))

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Empty for a single row of features, which has no covariance."""
        rows = self.rows(video.clamp(-1, 1))
        return {self.name: distance(self.real, gaussian(rows))} if len(rows) > 1 else {}

    def rows(self, video: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (rows, D), one row per clip or frame."""
        frames = video.shape[2]
        if not self.features.of_clips and self.cfg.frames and self.cfg.frames < frames:
            video = video[:, :, torch.linspace(0, frames - 1, self.cfg.frames).round().long()]
        features = self.features(video.float().nan_to_num())
        return features if self.features.of_clips else features.flatten(0, 1)

    def meaning(self) -> dict[str, str]:
        network = f"{self.cfg.network}{score_note(self.cfg.weights)}"
        return {self.name: f"Frechet distance to real clips in features of {network}; "
                "equal 0, larger for few clips"}  # fmt: skip
