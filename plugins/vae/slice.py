"""Slice VAE of EasyAnimate (aigc-apps/EasyAnimate, July 2024): MagViT's network on slices of time.

Parameter names and shapes are those of `vae=magvit`. Convolutions look one frame back and one
ahead, and the decoder of a slice sees the slices beside it: no seams to smooth. What a slice is
made of is an argument of the layers, never their state.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plugins._blocks.autoencoder3d import Decoder3D, Encoder3D, start_linear, tiled
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.inflate import inflated, is_of_pictures
from plugins._blocks.posterior import Gaussian
from plugins._configs.autoencoder3d import Autoencoder3DConfig
from sandbox.contracts import Clip, Draws, SizeError
from sandbox.registry import register


@register("vae", "slice")
class SliceVAE(FirstStage):
    """Slice VAE of EasyAnimate: slices of 8 frames, and a first frame that may stand alone."""

    @dataclass
    class Config(Autoencoder3DConfig):
        mini_batch_encoder: int = 8  # frames of a slice; the encoder shares nothing between them
        mini_batch_decoder: int = 2  # latent frames of a slice; the decoder sees its neighbours
        tile_sample_min_size: int = 384

        def problems_of_windows(self, time: int) -> Iterator[str]:
            frames, latents = self.mini_batch_encoder, self.mini_batch_decoder
            if frames > 0 and frames % time:
                yield f"mini_batch_encoder={frames}: want a multiple of {time}"
            elif frames == 1:
                yield "mini_batch_encoder=1: want 2 or more, a single frame stands alone"
            elif frames > 0 and latents != frames // time:
                yield (
                    f"mini_batch_decoder={latents}: want {frames // time}, the latents of "
                    f"mini_batch_encoder={frames} frames"
                )

        def latent_frames(self, frames: int) -> int:
            """Slices of latents for slices of frames, and one for a first frame that is over."""
            slices, rest = divmod(frames, self.mini_batch_encoder)
            if self.mini_batch_decoder == 1:  # else one latent could be a slice or a picture
                allowed, also = (1,), ""
            else:
                allowed, also = (0, 1), f", or {self.mini_batch_encoder} k"
            if frames < 1 or rest not in allowed:
                rule = f"{self.mini_batch_encoder} k + 1{also}, in whole slices"
                raise SizeError("frames", frames, rule)
            return slices * self.mini_batch_decoder + rest

    def __init__(self, cfg: Config) -> None:
        z = cfg.latent_channels
        super().__init__(z, cfg.scale_factor, cfg.shift)
        self.cfg = cfg
        attention = cfg.mid_block_attention_type if cfg.mid_block_use_attention else None
        common = (cfg.norm_num_groups, cfg.mid_block_num_attention_heads, attention, False)
        widths, layers = cfg.widths(), cfg.layers_per_block
        self.encoder = Encoder3D(widths, cfg.down_factors(), layers, 2 * z, *common)
        self.decoder = Decoder3D(widths[::-1], cfg.up_factors(), layers + 1, z, *common)
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)
        if cfg.start == "haar":
            start_linear(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1], T = 8 k or 8 k + 1; raises SizeError for other sizes."""
        self.cfg.latents(Clip(*x.shape[1:]))
        size, latents = self.tile_sizes()
        return Gaussian(self.per_tile(self.moments, x, size, latents))

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights to begin with: its own, or those of a 2-D autoencoder (`frame` 1 of kernels)."""
        return inflated(state, 1) if is_of_pictures(state) else state

    def posterior(self, stored: Tensor) -> Gaussian:
        return Gaussian(stored)

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, t, h, w), whole slices and maybe one before -> (B, 3, T, H, W).

        Not clamped; raises ValueError for other numbers of frames.
        """
        slices = self.cfg.mini_batch_decoder
        if z.shape[2] % slices not in (0, 1):
            raise ValueError(f"latents have {z.shape[2]} frames: want {slices} k or {slices} k + 1")
        size, latents = self.tile_sizes()
        return self.per_tile(self.drawn, z, latents, size)

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled latents -> (B, 3, T, H, W) in [-1, 1]."""
        return self.pixels(self.unscaled(z)).clamp(-1, 1)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, t, h, w) of (B, 3, T, H, W), slice by slice."""
        first, rest = apart(x, self.cfg.mini_batch_encoder)
        made = [self.encoder(part) for part in (*first, *rest)]
        return self.quant_conv(torch.cat(made, 2))

    def drawn(self, z: Tensor) -> Tensor:
        """(B, 3, T, H, W) of unscaled latents (B, C, t, h, w); a slice sees those beside it."""
        first, rest = apart(self.post_quant_conv(z), self.cfg.mini_batch_decoder)
        video = [self.decoder.draw(self.decoder.features(part), still=True) for part in first]
        for i, part in enumerate(rest):
            before = rest[i - 1 : i] if i else []  # as published: never the frame that stands alone
            seen = torch.cat([*before, part, *rest[i + 1 : i + 2]], 2)
            start = part.shape[2] * len(before)
            features = self.decoder.features(seen)[:, :, start : start + part.shape[2]]
            video.append(self.decoder.draw(features))
        return torch.cat(video, 2)

    def tile_sizes(self) -> tuple[int, int]:
        """Height and width of a tile, in pixels and in latents."""
        size = self.cfg.tile_sample_min_size
        return size, size // self.cfg.factors()[1]

    def per_tile(self, fn: Callable[[Tensor], Tensor], x: Tensor, size: int, out: int) -> Tensor:
        """fn(x), in tiles where x is higher and wider than one and the Config asks for them."""
        if not self.cfg.use_tiling or min(x.shape[-2:]) <= size:
            return fn(x)
        return tiled(fn, x, size, out, self.cfg.tile_overlap_factor)


def apart(x: Tensor, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first frame of x (B, C, T, H, W) where it is over, and slices of `size` frames.

    Slices of one frame leave none over: there the first always stands alone.
    """
    alone = 1 if size == 1 else x.shape[2] % size
    rest = x[:, :, alone:]
    return ([x[:, :, :1]] if alone else []), list(rest.split(size, 2)) if rest.shape[2] else []
