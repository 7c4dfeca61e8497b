"""MagViT VAE of EasyAnimateV2 (aigc-apps/EasyAnimate, June 2024): causal 3-D convolutions, 8x in space, 4x in time.

Parameter names and shapes are the published ones. What the published pipeline does around the network happens inside
`encode` and `decode`: windows of frames, tiles of pixels, clamping, and smoothing of the seams between windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from plugins._blocks.autoencoder3d import Decoder3D, Encoder3D
from plugins._blocks.posterior import Gaussian
from sandbox.contracts import (
    Clip,
    Draws,
    FirstStageConfig,
    Misfit,
    above,
    in_range,
    must_divide,
    one_of,
    same_length,
)
from sandbox.registry import register

# What a block divides or multiplies (time, space) by; as published, the last block of a network keeps the size.
DOWN_BLOCKS = {"SpatialDownBlock3D": (1, 2), "SpatialTemporalDownBlock3D": (2, 2)}
UP_BLOCKS = {"SpatialUpBlock3D": (1, 2), "SpatialTemporalUpBlock3D": (2, 2)}
ATTENTIONS = ("3d", "spatial")


@register("vae", "magvit")
class MagViT(nn.Module):
    """Causal 3-D VAE of EasyAnimateV2 (MagViT): Gaussian latents, first frame alone, then groups of frames."""

    @dataclass
    class Config(FirstStageConfig):
        ch: int = 16
        ch_mult: tuple[int, ...] = (1, 2, 4)
        down_block_types: tuple[str, ...] = ("SpatialTemporalDownBlock3D",) * 3
        up_block_types: tuple[str, ...] = ("SpatialTemporalUpBlock3D",) * 3
        layers_per_block: int = 1  # residual blocks in a level of the encoder; the decoder has one more
        latent_channels: int = 16
        norm_num_groups: int = 8
        mid_block_use_attention: bool = True
        mid_block_attention_type: str = "3d"
        mid_block_num_attention_heads: int = 1
        mini_batch_encoder: int = 9  # frames of a window; nothing crosses windows
        mini_batch_decoder: int = 3  # latent frames of a window
        use_tiling: bool = False
        tile_sample_min_size: int = 256
        tile_overlap_factor: float = 0.25
        smooth_output: bool = False
        scale_factor: float = 0.18215

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("ch", "layers_per_block", "latent_channels", "norm_num_groups"):
                yield from in_range(name, getattr(self, name), 1)

        def down_factors(self) -> tuple[tuple[int, int], ...]:
            """What each level of the encoder divides (time, space) by; the last keeps the size."""
            return (*(DOWN_BLOCKS[b] for b in self.down_block_types[:-1]), (1, 1))

        def up_factors(self) -> tuple[tuple[int, int], ...]:
            """What each level of the decoder multiplies (time, space) by; the last keeps the size."""
            return (*(UP_BLOCKS[b] for b in self.up_block_types[:-1]), (1, 1))

        def latents(self, clip: Clip) -> Clip:
            return clip

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        widths = tuple(cfg.ch * m for m in cfg.ch_mult)
        attention = cfg.mid_block_attention_type if cfg.mid_block_use_attention else None
        z = cfg.latent_channels
        self.encoder = Encoder3D(
            widths, cfg.down_factors(), cfg.layers_per_block, 2 * z,
            cfg.norm_num_groups, cfg.mid_block_num_attention_heads, attention,
        )
        self.decoder = Decoder3D(
            widths[::-1], cfg.up_factors(), cfg.layers_per_block + 1, z,
            cfg.norm_num_groups, cfg.mid_block_num_attention_heads, attention,
        )
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)

    def moments(self, x):
        return self.quant_conv(self.encoder(x))

    def pixels(self, z):
        return self.decoder(self.post_quant_conv(z))
