"""Frechet distance between generated clips and real training clips, in features of a network.

`network=inception_v3` is FID (Heusel et al. 2017, 1706.08500), a video network FVD (Unterthiner et
al. 2018, 1812.01717). Both fall with the number of clips: compare equal numbers, and read the row
of real held-out clips as what is out of reach. A network of your own is a TorchScript file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.features import Features
from plugins._blocks.frechet import distance, gaussian
from plugins._configs.features import NETWORKS, weights_file, weights_problems
from sandbox.contracts import MetricConfig, in_range
from sandbox.registry import register


@register("metric", "frechet")
class Frechet:
    """Frechet distance to real clips: FID, FVD, or of any network."""

    @dataclass
    class Config(MetricConfig):
        """network: one of plugins/_configs/features.py. weights: "hub", a file, or "random" (for
        tests: it compares nothing that people see). reference: real training clips. frames: of
        each clip, spread evenly, that a network of pictures looks at; null takes all.
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

        def learns_from(self) -> int:
            return self.reference

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.features = Features(cfg.network, cfg.weights, "metric.weights")
        self.name = "frechet_video" if NETWORKS[cfg.network] else "frechet_image"

    def fit(self, video: Tensor, captions: list[str]) -> None:
        self.real = gaussian(self.rows(video))

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Without a distance where there is one row of features: it has no covariance."""
        rows = self.rows(video.clamp(-1, 1))
        return {self.name: distance(self.real, gaussian(rows))} if len(rows) > 1 else {}

    def rows(self, video: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (rows, D), a row for each clip or picture."""
        frames = video.shape[2]
        if not self.features.of_clips and self.cfg.frames and self.cfg.frames < frames:
            video = video[:, :, torch.linspace(0, frames - 1, self.cfg.frames).round().long()]
        found = self.features(video.float().nan_to_num())
        return found if self.features.of_clips else found.flatten(0, 1)

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def proportions(self) -> frozenset[str]:
        return frozenset()

    def meaning(self) -> dict[str, str]:
        what = f"Frechet distance to real clips in features of {self.cfg.network}"
        known = " (random: tells nothing)" if self.cfg.weights == "random" else ""
        return {self.name: f"{what}{known}; equal 0, of few clips more"}
