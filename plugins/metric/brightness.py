"""Brightness of clips and its spread.

Lin et al. 2023 (2305.08891, sections 2 and 3.1): a model whose training never reaches pure noise
generates clips of medium brightness, none very dark or very bright.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plugins._blocks.metrics import ClipMetric
from sandbox.contracts import MetricConfig
from sandbox.registry import register

LUMINANCE = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue (ITU-R BT.709)


@register("metric", "brightness")
class Brightness(ClipMetric):
    """Mean luminance of a clip, and its spread and range over clips."""

    @dataclass
    class Config(MetricConfig):
        def fit_clips(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        levels = self.per_clip(video, captions)["brightness"]
        dark, bright = levels.quantile(torch.tensor([0.05, 0.95]).to(levels)).tolist()
        return {
            "brightness_spread": levels.std(correction=0).item(),
            "brightness_range": bright - dark,
            "brightness": levels.mean().item(),
            "dark": dark,
            "bright": bright,
        }

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) float64 in [0, 1]: mean luminance of each clip of (N, 3, T, H, W) in [-1, 1]."""
        pixels = (video.double().nan_to_num().clamp(-1, 1) + 1) / 2
        weights = torch.tensor(LUMINANCE, dtype=pixels.dtype)
        return {"brightness": torch.einsum("ncthw,c->nthw", pixels, weights).mean((1, 2, 3))}

    def meaning(self) -> dict[str, str]:
        return {
            "brightness_spread": "standard deviation of brightness over clips; compare with real",
            "brightness_range": "difference of the 95th and 5th percentile of brightness",
            "brightness": "mean luminance of a clip; black 0, white 1",
            "dark": "5th percentile of brightness over clips",
            "bright": "95th percentile of brightness over clips",
        }
