"""PSNR, SSIM and LPIPS of clips against the real ones in whose place they stand.

Of "real through first stage" it measures the first stage, of "model" how well the held-out clip
itself was predicted, as image-to-video and video prediction are judged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins._blocks.lpips import LPIPS
from sandbox.contracts import Clip, MetricConfig, in_range
from sandbox.registry import register

WINDOW = 11  # pixels of SSIM's window
SIGMA = 1.5
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of pixels in [-1, 1], whose range is 2
LEAST = 1e-10  # mean squared error of equal clips: 106 dB
AT_ONCE = 4  # clips


@register("metric", "reconstruction")
class Reconstruction:
    """PSNR, SSIM and LPIPS against the real clip; for first stages, also in task=train_vae."""

    @dataclass
    class Config(MetricConfig):
        """lpips: null (leaves it out), "hub" (528 MB), a folder or a file; "random" for tests."""

        lpips: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()

        def files(self) -> dict[str, str | None]:
            is_here = self.lpips not in (None, "hub", "random")
            return {"lpips": self.lpips} if is_here else {}

        def needs(self) -> frozenset[str]:
            return frozenset({"video"})

        def accepts(self, clip: Clip) -> Iterator[str]:
            for name in ("height", "width"):
                least = WINDOW if self.lpips is None else 16  # VGG halves it four times
                yield from in_range(name, getattr(clip, name), least)

        def learns_from(self) -> int:
            return 0

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.lpips = LPIPS(cfg.lpips, "metric.lpips") if cfg.lpips else None

    def fit(self, video: Tensor, captions: list[str]) -> None:
        """There is nothing to learn."""

    def set_references(self, real: Tensor) -> None:
        self.real = real

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        return {k: v.mean().item() for k, v in self.per_clip(video, captions).items()}

    @torch.no_grad()
    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Means over the frames of each clip, (N,)."""
        if video.shape != self.real.shape:
            raise ValueError(f"{[*video.shape]} clips beside real ones of {[*self.real.shape]}")
        clips = video.float().nan_to_num().clamp(-1, 1)
        pairs = zip(clips.split(AT_ONCE), self.real.float().split(AT_ONCE), strict=True)
        found = [self._of(x, y) for x, y in pairs]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _of(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        frames = x.shape[2]
        x, y = (v.transpose(1, 2).flatten(0, 1) for v in (x, y))  # (n * T, 3, H, W)
        found = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
        if self.lpips is not None:
            found["lpips"] = self.lpips(x, y)
        return {k: v.view(-1, frames).mean(1) for k, v in found.items()}

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        return {}

    def proportions(self) -> frozenset[str]:
        return frozenset()

    def meaning(self) -> dict[str, str]:
        found = {
            "psnr": "peak signal-to-noise ratio of frames against the real ones, dB; equal 106",
            "ssim": "structural similarity with the real frames; equal 1",
        }
        if self.cfg.lpips:
            known = " (random: tells nothing)" if self.cfg.lpips == "random" else ""
            found["lpips"] = f"perceptual distance to the real frames (VGG){known}; equal 0"
        return found


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1] -> (N,) dB."""
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(LEAST))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of pictures (N, C, H, W) in [-1, 1] -> (N,), mean of the channels.

    Wang et al. 2004, eq. 13: a Gaussian window of 11 pixels and sigma 1.5, only where all of it is
    in the picture; variances of the population, as published.
    """
    x, y = x.double(), y.double()  # variances are differences of near numbers
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-places.square() / (2 * SIGMA**2)).exp()
    window = window / window.sum()

    def blurred(v: Tensor) -> Tensor:
        v = v.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(v, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mx, my = blurred(x), blurred(y)
    vx, vy = blurred(x * x) - mx * mx, blurred(y * y) - my * my
    both = blurred(x * y) - mx * my
    found = (2 * mx * my + C1) * (2 * both + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return found.unflatten(0, x.shape[:2]).flatten(1).mean(1).float()
