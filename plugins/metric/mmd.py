"""Squared maximum mean discrepancy (MMD) of generated clips to real training clips.

Gretton et al. 2012 (JMLR 13), with an RBF or polynomial kernel on the features of any network.
JEDi (Luo et al. 2024, 2410.05203) uses a quadratic kernel on V-JEPA features, CMMD (Jayasumana et
al. 2024, 2401.09603) an RBF kernel on CLIP features; neither assumes Gaussian features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.distribution import DistributionMetric
from plugins._blocks.mmd import Kernel, median_distance, polynomial, rbf, squared_mmd
from plugins._configs.features import DistributionConfig
from sandbox.contracts import ConfigError, above, in_range, one_of
from sandbox.registry import register

KERNELS = ("rbf", "polynomial")


@register("metric", "mmd")
class MMD(DistributionMetric):
    """Squared MMD to real clips, with an RBF or polynomial kernel (as in JEDi and CMMD)."""

    kind = "mmd"

    @dataclass
    class Config(DistributionConfig):
        """network: a name in plugins/_configs/features.py. weights: "hub", a file, or "random" (for
        tests). reference: number of real training clips. frames: number of evenly spaced frames of
        each clip for an image network; null uses all.

        kernel: "rbf", exp(-|x - y|^2 / (2 sigma^2)), or "polynomial", (gamma x.y + coef)^degree.
        sigma: null is the median distance of real features. gamma: null is 1 / number of features.
        biased: whether pairs of a row with itself count. unit_length: normalise features first.
        scale: factor of the score.
        """

        kernel: str = "rbf"
        sigma: float | None = None
        degree: int = 3
        gamma: float | None = None
        coef: float = 1.0
        biased: bool = False
        unit_length: bool = False
        scale: float = 1000.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("kernel", self.kernel, KERNELS)
            yield from above("sigma", self.sigma, 0)
            if self.sigma is not None and self.kernel != "rbf":
                yield f"sigma={self.sigma}: is of kernel=rbf only; want null"
            if self.gamma is not None and self.kernel == "rbf":
                yield f"gamma={self.gamma}: is of kernel=polynomial only; want null and sigma"
            yield from in_range("degree", self.degree, 1, 10)
            yield from above("gamma", self.gamma, 0)
            yield from in_range("coef", self.coef, 0, 1e6)
            yield from above("scale", self.scale, 0)

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Raises ConfigError where the features of real clips determine no sigma."""
        self.real = self.rows(video)
        self.kernel = self._kernel()

    def _kernel(self) -> Kernel:
        cfg = self.cfg
        if cfg.kernel == "polynomial":
            return partial(polynomial, degree=cfg.degree, gamma=cfg.gamma, coef=cfg.coef)
        sigma = cfg.sigma or median_distance(self.real)
        if not sigma > 0:
            raise ConfigError(
                "metric.sigma=null: most features of real clips are equal, so their median "
                "distance is 0; set metric.sigma, or another metric.network"
            )
        return partial(rbf, sigma=sigma)

    def rows(self, video: Tensor) -> Tensor:
        """(N, 3, T, H, W) -> (rows, D), one row per clip or frame."""
        rows = super().rows(video)
        return F.normalize(rows, dim=1) if self.cfg.unit_length else rows

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Empty for a single row of features, which has no unbiased estimate."""
        rows, cfg = self.rows(video), self.cfg
        if len(rows) < 2:
            return {}
        return {self.name: cfg.scale * squared_mmd(self.kernel, rows, self.real, cfg.biased)}

    def meaning(self) -> dict[str, str]:
        cfg, width = (
            self.cfg,
            "median sigma" if self.cfg.sigma is None else f"sigma {self.cfg.sigma:g}",
        )
        kernel = f"degree {cfg.degree}" if cfg.kernel == "polynomial" else width
        least = "equal 0, larger for few clips" if cfg.biased else "equal 0, may be negative"
        return {
            self.name: f"{cfg.scale:g} x squared MMD ({cfg.kernel} kernel, {kernel}) to real clips "
            f"in {self.cfg.described()}; {least}"
        }
