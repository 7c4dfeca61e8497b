"""MagViT VAE of EasyAnimateV2 (aigc-apps/EasyAnimate, June 2024): 8x in space, 4x in time.

Parameter names and shapes are the published ones; the published size is the preset
`magvit_easyanimate_v2`. `encode` and `decode` include the steps of the published pipeline: windows
of frames, tiles of pixels, clamping, and smoothing of the seams between windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plugins._blocks.easyanimate_vae import EasyAnimateVAE
from plugins._blocks.posterior import Gaussian
from plugins._configs.autoencoder3d import Autoencoder3DConfig
from sandbox.contracts import Clip, Draws, Misfit
from sandbox.registry import register


@register("vae", "magvit")
class MagViT(EasyAnimateVAE):
    """Causal 3-D VAE of EasyAnimateV2 (MagViT): 4 frames per latent frame, 1 for the first."""

    @dataclass
    class Config(Autoencoder3DConfig):
        """mini_batch_encoder, mini_batch_decoder: pixel and latent frames per window.

        Windows are encoded and decoded independently.
        """

        may_differ: ClassVar[tuple[str, ...]] = (*Autoencoder3DConfig.may_differ, "smooth_output")

        smooth_output: bool = False  # smooth seams between windows; doubles the cost of decoding

        def window_problems(self, time: int) -> Iterator[str]:
            window = self.mini_batch_encoder
            if window > 0 and (window - 1) % time:
                yield f"mini_batch_encoder={window}: want 1 plus a multiple of {time}"
            elif window > 0 and self.mini_batch_decoder != (window - 1) // time + 1:
                want = (window - 1) // time + 1
                yield (
                    f"mini_batch_decoder={self.mini_batch_decoder}: want {want}, the latent frames "
                    f"of mini_batch_encoder={window}"
                )

        def latent_frames(self, frames: int) -> int:
            """One latent frame for an image, `mini_batch_decoder` latent frames per window."""
            windows, rest = divmod(frames, self.mini_batch_encoder)
            if frames != 1 and (rest or windows < 1):
                rule = f"1 or a multiple of {self.mini_batch_encoder}, the frames of a window"
                raise Misfit("frames", frames, rule)
            return 1 if frames == 1 else windows * self.mini_batch_decoder

    cfg: Config  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in the base

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg, causal=True)

    def tiled_side(self, height: int, width: int) -> int:
        return max(height, width)

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1], T = 1 or k windows; raises Misfit for other sizes."""
        self.cfg.latents(Clip(*x.shape[1:]))
        windows = x.split(self.cfg.mini_batch_encoder, 2)
        return Gaussian(torch.cat([self.moments(window) for window in windows], 2))

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, t, h, w), t = 1 or k windows -> (B, 3, T, H, W), not clamped."""
        window = self.cfg.mini_batch_decoder
        if z.shape[2] != 1 and z.shape[2] % window:
            raise ValueError(f"latents have {z.shape[2]} frames: want 1 or a multiple of {window}")
        return torch.cat([self.window_of_pixels(part) for part in z.split(window, 2)], 2)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents -> (B, 3, T, H, W) in [-1, 1]; `draws` are used by `smoothed`."""
        video = self.pixels(self.unscaled(z)).clamp(-1, 1)
        return self.smoothed(video, draws) if self.cfg.smooth_output else video

    def smoothed(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """Mean of a video and its reconstruction from windows shifted by half a window.

        (B, 3, T, H, W) in [-1, 1]; half a window at each end is unchanged. As published, the
        reconstruction is of a posterior sample (draw "smooth"); without `draws`, of the mean.
        """
        window = self.cfg.mini_batch_encoder
        if video.shape[2] <= window:
            return video
        first, last = window // 2, video.shape[2] - (window - window // 2)
        inner = video[:, :, first:last]
        posterior = self.encode(inner)
        z = posterior.mean
        if draws is not None:
            z = posterior.sample(draws.normal("smooth", z))
        inner = (inner + self.pixels(z)) / 2
        return torch.cat([video[:, :, :first], inner.clamp(-1, 1), video[:, :, last:]], 2)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, t, h, w) of one window (B, 3, T, H, W)."""
        return self.per_tile(lambda part: self.quant_conv(self.encoder(part)), x, to_latents=True)

    def window_of_pixels(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of one window of unscaled latents (B, C, t, h, w)."""
        return self.per_tile(
            lambda part: self.decoder(self.post_quant_conv(part)), z, to_latents=False
        )
