"""Kernel Inception Distance of generated clips to real training clips (1801.01401).

Binkowski et al. 2018, section 4: the unbiased squared MMD with the kernel (x.y / D + 1)^3, averaged
over random subsets. In contrast to FID its expectation does not depend on the number of clips, and
it assumes no Gaussian features. With a video network it is the Kernel Video Distance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from plugins._blocks.distribution import DistributionMetric
from plugins._blocks.mmd import subset_mmds
from plugins._configs.features import DistributionConfig
from sandbox.contracts import in_range
from sandbox.registry import register

SCALE = 1000  # scores are small; publications give 1000 x KID


@register("metric", "kid")
class KID(DistributionMetric):
    """Kernel Inception Distance to real clips x 1000: unbiased for any number of clips."""

    kind = "kid"

    @dataclass
    class Config(DistributionConfig):
        """network: a name in plugins/_configs/features.py. weights: "hub", a file, or "random" (for
        tests). reference: number of real training clips. frames: number of evenly spaced frames of
        each clip for an image network; null uses all. subsets: number of random subsets;
        subset_size: rows of each, or all rows of the smaller set if it has fewer.
        """

        subsets: int = 100
        subset_size: int = 1000

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("subsets", self.subsets, 1)
            yield from in_range("subset_size", self.subset_size, 2)

    def fit(self, video: Tensor, captions: list[str]) -> None:
        self.real = self.rows(video)

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Mean and standard deviation over subsets; empty for a single row of features."""
        rows = self.rows(video)
        if len(rows) < 2:
            return {}
        values = SCALE * subset_mmds(rows, self.real, self.cfg.subsets, self.cfg.subset_size)
        return {
            self.name: values.mean().item(),
            f"{self.name}_std": values.std(correction=0).item(),
        }

    def meaning(self) -> dict[str, str]:
        of = f"{self.cfg.subsets} subsets of at most {self.cfg.subset_size} rows"
        return {
            self.name: f"{SCALE} x KID (unbiased cubic MMD) to real clips, "
            f"mean over {of}, in {self.cfg.described()}; equal 0, may be negative",
            f"{self.name}_std": f"its standard deviation over {of}",
        }
