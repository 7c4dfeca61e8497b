"""MagViT VAE of EasyAnimateV2 (aigc-apps/EasyAnimate, June 2024): 8x in space, 4x in time.

Parameter names and shapes are the published ones; the published size is the preset
`magvit_easyanimate_v2`. What the published pipeline does around the network happens inside `encode`
and `decode`: windows of frames, tiles of pixels, clamping, smoothing of the seams between windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks.autoencoder3d import Decoder3D, Encoder3D, start_linear, tiled
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.inflate import inflated, is_of_pictures
from plugins._blocks.posterior import Gaussian
from plugins._configs.autoencoder3d import Autoencoder3DConfig
from sandbox.contracts import Clip, Draws, SizeError
from sandbox.registry import register


@register("vae", "magvit")
class MagViT(FirstStage):
    """Causal 3-D VAE of EasyAnimateV2 (MagViT): 4 frames make one, the first stands alone."""

    @dataclass
    class Config(Autoencoder3DConfig):
        """mini_batch_encoder, mini_batch_decoder: frames and latents of a window; nothing crosses
        windows.
        """

        may_differ: ClassVar[tuple[str, ...]] = (*Autoencoder3DConfig.may_differ, "smooth_output")

        smooth_output: bool = False  # soften the seams between windows; doubles the cost of decode

        def problems_of_windows(self, time: int) -> Iterator[str]:
            window = self.mini_batch_encoder
            if window > 0 and (window - 1) % time:
                yield f"mini_batch_encoder={window}: want 1 plus a multiple of {time}"
            elif window > 0 and self.mini_batch_decoder != (window - 1) // time + 1:
                want = (window - 1) // time + 1
                yield (
                    f"mini_batch_decoder={self.mini_batch_decoder}: want {want}, the latents of "
                    f"mini_batch_encoder={window} frames"
                )

        def latent_frames(self, frames: int) -> int:
            """A picture gives one frame of latents, k windows give k times `mini_batch_decoder`."""
            windows, rest = divmod(frames, self.mini_batch_encoder)
            if frames != 1 and (rest or windows < 1):
                rule = f"1 or a multiple of {self.mini_batch_encoder}, the frames of a window"
                raise SizeError("frames", frames, rule)
            return 1 if frames == 1 else windows * self.mini_batch_decoder

    def __init__(self, cfg: Config) -> None:
        z = cfg.latent_channels
        super().__init__(z, cfg.scale_factor, cfg.shift)
        self.cfg = cfg
        attention = cfg.mid_block_attention_type if cfg.mid_block_use_attention else None
        common = (cfg.norm_num_groups, cfg.mid_block_num_attention_heads, attention)
        widths, layers = cfg.widths(), cfg.layers_per_block
        self.encoder = Encoder3D(widths, cfg.down_factors(), layers, 2 * z, *common)
        self.decoder = Decoder3D(widths[::-1], cfg.up_factors(), layers + 1, z, *common)
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)
        if cfg.start == "haar":
            start_linear(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1], T = 1 or k windows; raises SizeError for other sizes."""
        self.cfg.latents(Clip(*x.shape[1:]))
        windows = x.split(self.cfg.mini_batch_encoder, 2)
        return Gaussian(torch.cat([self.moments(window) for window in windows], 2))

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights to begin with: its own, or those of a 2-D autoencoder (`frame` -1 of kernels)."""
        return inflated(state, -1) if is_of_pictures(state) else state

    def posterior(self, stored: Tensor) -> Gaussian:
        return Gaussian(stored)

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, t, h, w), t = 1 or k windows -> (B, 3, T, H, W), not clamped."""
        window = self.cfg.mini_batch_decoder
        if z.shape[2] != 1 and z.shape[2] % window:
            raise ValueError(f"latents have {z.shape[2]} frames: want 1 or a multiple of {window}")
        return torch.cat([self.window_of_pixels(part) for part in z.split(window, 2)], 2)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents -> (B, 3, T, H, W) in [-1, 1]; `draws` are for `smoothed`."""
        video = self.pixels(self.unscaled(z)).clamp(-1, 1)
        return self.smoothed(video, draws) if self.cfg.smooth_output else video

    def smoothed(self, video: Tensor, draws: Draws | None = None) -> Tensor:
        """The mean of a video and of its copy from windows that lie across the seams.

        (B, 3, T, H, W) in [-1, 1]; half a window stays as it is at each end. As published, a sample
        of the posterior is decoded (draw "smooth"); without `draws` its mean.
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
        size, latents = self.tile_sizes()
        return self.per_tile(lambda part: self.quant_conv(self.encoder(part)), x, size, latents)

    def window_of_pixels(self, z: Tensor) -> Tensor:
        """(B, 3, T, H, W) of one window of unscaled latents (B, C, t, h, w)."""
        size, latents = self.tile_sizes()
        return self.per_tile(
            lambda part: self.decoder(self.post_quant_conv(part)), z, latents, size
        )

    def tile_sizes(self) -> tuple[int, int]:
        """Height and width of a tile, in pixels and in latents."""
        size = self.cfg.tile_sample_min_size
        return size, size // self.cfg.factors()[1]

    def per_tile(self, fn: Callable[[Tensor], Tensor], x: Tensor, size: int, out: int) -> Tensor:
        """fn(x), in tiles where x is higher or wider than one and the Config asks for them."""
        if not self.cfg.use_tiling or max(x.shape[-2:]) <= size:
            return fn(x)
        return tiled(fn, x, size, out, self.cfg.tile_overlap_factor)
