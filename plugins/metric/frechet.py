"""Frechet distance of generated clips to real training clips, in the features of a network.

`network=inception_v3` gives FID (Heusel et al. 2017, 1706.08500), a video network FVD (Unterthiner
et al. 2018, 1812.01717). Both decrease with the number of clips: compare equal numbers, and take
the row of real held-out clips as the lower bound. Your own network is a TorchScript file.
"""

from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.distribution import DistributionMetric
from plugins._blocks.frechet import distance, gaussian
from plugins._configs.features import DistributionConfig
from sandbox.registry import register


@register("metric", "frechet")
class Frechet(DistributionMetric):
    """Frechet distance to real clips: FID, FVD, or with the features of any network."""

    kind = "frechet"

    @dataclass
    class Config(DistributionConfig):
        """network: a name in plugins/_configs/features.py. weights: "hub", a file, or "random" (for
        tests). reference: number of real training clips. frames: number of evenly spaced frames of
        each clip for an image network; null uses all.
        """

    def fit(self, video: Tensor, captions: list[str]) -> None:
        self.real = gaussian(self.rows(video))

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Empty for a single row of features, which has no covariance."""
        rows = self.rows(video)
        return {self.name: distance(self.real, gaussian(rows))} if len(rows) > 1 else {}

    def meaning(self) -> dict[str, str]:
        return {
            self.name: f"Frechet distance to real clips in {self.cfg.described()}; "
            "equal 0, larger for few clips"
        }
