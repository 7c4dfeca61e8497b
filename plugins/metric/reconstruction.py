"""PSNR, SSIM and LPIPS of clips against the corresponding real clips.

The row "real through first stage" measures the first stage; the row "model" measures how well the
held-out clip is predicted, as usual for image-to-video and video prediction.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.lpips import LPIPS
from plugins._blocks.metrics import ClipMetric
from plugins._configs.features import score_note
from sandbox.contracts import Clip, MetricConfig, in_range
from sandbox.registry import register

WINDOW = 11  # side of SSIM's window in pixels
SIGMA = 1.5
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for pixels in [-1, 1], with range 2
MIN_ERROR = 1e-10  # mean squared error of equal clips: 106 dB
BATCH = 4  # clips


@register("metric", "reconstruction")
class Reconstruction(ClipMetric):
    """PSNR, SSIM and LPIPS against the real clip; for first stages, also in task=train_vae."""

    @dataclass
    class Config(MetricConfig):
        """lpips: null (no LPIPS), "hub" (528 MB), a folder or a file; "random" for tests."""

        lpips: str | None = None

        def files(self) -> dict[str, str | None]:
            return {} if self.lpips in (None, "hub", "random") else {"lpips": self.lpips}

        def needs(self) -> frozenset[str]:
            return frozenset({"video"})

        def accepts(self, clip: Clip) -> Iterator[str]:
            for name in ("height", "width"):
                least = WINDOW if self.lpips is None else 16  # VGG halves sizes four times
                yield from in_range(name, getattr(clip, name), least)

        def fit_clips(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.lpips = LPIPS(cfg.lpips, "metric.lpips") if cfg.lpips else None

    def set_references(self, real: Tensor) -> None:
        self.real = real

    @torch.no_grad()
    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) per score: means over the frames of each clip."""
        if video.shape != self.real.shape:
            raise ValueError(f"clips are {[*video.shape]}, the real clips {[*self.real.shape]}")
        clips = video.float().nan_to_num().clamp(-1, 1)
        pairs = zip(clips.split(BATCH), self.real.float().split(BATCH), strict=True)
        parts = [self._compare(x, y) for x, y in pairs]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _compare(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        frames = x.shape[2]
        x, y = (v.transpose(1, 2).flatten(0, 1) for v in (x, y))  # (n * T, 3, H, W)
        scores = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
        if self.lpips is not None:
            scores["lpips"] = self.lpips(x, y)
        return {k: v.view(-1, frames).mean(1) for k, v in scores.items()}

    def meaning(self) -> dict[str, str]:
        meaning = {
            "psnr": "peak signal-to-noise ratio against the real frames in dB; equal 106",
            "ssim": "structural similarity with the real frames; equal 1",
        }
        if self.cfg.lpips:
            note = score_note(self.cfg.lpips)
            meaning["lpips"] = f"perceptual distance to the real frames (VGG){note}; equal 0"
        return meaning


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> (N,) in dB."""
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(MIN_ERROR))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (N, C, H, W) in [-1, 1] -> (N,), mean over channels.

    Wang et al. 2004, eq. 13: a Gaussian window of 11 pixels with sigma 1.5, without padding;
    population variances, as published.
    """
    x, y = x.double(), y.double()  # variances are differences of nearly equal numbers
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-offsets.square() / (2 * SIGMA**2)).exp()
    window = window / window.sum()

    def blurred(v: Tensor) -> Tensor:
        v = v.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(v, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mx, my = blurred(x), blurred(y)
    vx, vy = blurred(x * x) - mx * mx, blurred(y * y) - my * my
    cov = blurred(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.unflatten(0, x.shape[:2]).flatten(1).mean(1).float()
