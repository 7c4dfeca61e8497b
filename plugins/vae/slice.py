"""Slice VAE of EasyAnimate (aigc-apps/EasyAnimate, July 2024): MagViT's network on slices of time.

Parameter names and shapes are those of `vae=magvit`. Convolutions look one frame back and one
ahead, and the decoder of a slice sees the slices beside it: no seams to smooth. What a slice is
made of is an argument of the layers, never their state.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from plugins._blocks.autoencoder3d import Decoder3D, Encoder3D, start_linear, tiled
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import Gaussian
from sandbox.contracts import (
    Clip,
    Draws,
    FirstStageConfig,
    FirstStageRecipe,
    Misfit,
    above,
    in_range,
    must_divide,
    one_of,
    same_length,
)
from sandbox.registry import register

# What a block divides or multiplies (time, space) by; as published, the last block of a network
# keeps the size.
DOWN_BLOCKS = {"SpatialDownBlock3D": (1, 2), "SpatialTemporalDownBlock3D": (2, 2)}
UP_BLOCKS = {"SpatialUpBlock3D": (1, 2), "SpatialTemporalUpBlock3D": (2, 2)}
ATTENTIONS = ("3d", "spatial")
STARTS = ("published", "haar")


@register("vae", "slice")
class SliceVAE(FirstStage):
    """Slice VAE of EasyAnimate: slices of 8 frames, and a first frame that may stand alone."""

    @dataclass
    class Config(FirstStageConfig):
        ch: int = 16
        ch_mult: tuple[int, ...] = (1, 2, 2)  # one level each
        down_block_types: tuple[str, ...] = ("SpatialTemporalDownBlock3D",) * 3
        up_block_types: tuple[str, ...] = ("SpatialTemporalUpBlock3D",) * 3
        layers_per_block: int = 1  # residual blocks of a level; the decoder has one more
        latent_channels: int = 16
        norm_num_groups: int = 4  # 32 as published
        mid_block_use_attention: bool = True
        mid_block_attention_type: str = "3d"  # over all frames that it sees, or "spatial"
        mid_block_num_attention_heads: int = 1
        mini_batch_encoder: int = 8  # frames of a slice; the encoder shares nothing between them
        mini_batch_decoder: int = 2  # latent frames of a slice; the decoder sees its neighbours
        use_tiling: bool = False  # of pictures that are higher and wider than a tile
        tile_sample_min_size: int = 384  # height and width of a tile in pixels
        tile_overlap_factor: float = 0.25
        scale_factor: float | None = None  # of the latents; None: measured, per channel
        shift: float | None = None  # taken off first; None: measured, per channel
        start: str = "haar"  # weights before training: a Haar transform, or "published": random

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("ch", "layers_per_block", "latent_channels", "norm_num_groups",
                         "mid_block_num_attention_heads", "mini_batch_encoder",
                         "mini_batch_decoder", "tile_sample_min_size"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("tile_overlap_factor", self.tile_overlap_factor, 0, 0.5)
            yield from above("scale_factor", self.scale_factor, 0)
            yield from in_range("shift", self.shift, -100, 100)
            yield from one_of("mid_block_attention_type", self.mid_block_attention_type, ATTENTIONS)
            yield from one_of("start", self.start, STARTS)
            yield from self.problems_of_levels()

        def problems_of_levels(self) -> Iterator[str]:
            if not self.ch_mult or min(self.ch_mult) < 1:
                yield f"ch_mult={self.ch_mult}: want at least one level, each >= 1"
                return
            levels = len(self.ch_mult)
            for name, table in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
                yield from same_length(name, getattr(self, name), levels, "level of ch_mult")
                for block in sorted(set(getattr(self, name))):
                    yield from one_of(name, block, table)
            widths = self.widths()
            groups, heads = self.norm_num_groups, self.mid_block_num_attention_heads
            if groups > 0 and any(w % groups for w in widths):
                yield f"norm_num_groups={groups}: want a divisor of all widths {list(widths)}"
            if heads > 0 and widths[-1] % heads:
                yield f"mid_block_num_attention_heads={heads}: want a divisor of {widths[-1]}"
            small = levels < 2 or min(widths) < 6 or self.latent_channels < 3
            if self.start == "haar" and small:
                yield (
                    f"start='haar' with {list(widths)} channels, {self.latent_channels} latents: "
                    "want two levels, 6 channels in each and 3 latents, or 'published'"
                )
            known = set(self.down_block_types) <= set(DOWN_BLOCKS)
            if known and set(self.up_block_types) <= set(UP_BLOCKS):
                yield from self.problems_of_factors()

        def problems_of_factors(self) -> Iterator[str]:
            time, space = down = self.factors()
            up = tuple(map(prod, zip(*self.up_factors(), strict=True)))
            if up != down:
                yield (
                    f"up_block_types multiply (time, space) by {up}: want {down}, which "
                    "down_block_types divide it by (the last block of each keeps the size)"
                )
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
            size, overlap = self.tile_sample_min_size, self.tile_overlap_factor
            if size > 0 and size % space:
                yield f"tile_sample_min_size={size}: want a multiple of {space}"
            elif size > 0 and 0 < overlap <= 0.5:
                shared = size // space * overlap
                if abs(shared - round(shared)) > 1e-6:
                    yield (
                        f"tile_overlap_factor={overlap}: want tiles of {size // space} latents to "
                        f"share a whole number of them, not {shared:g}"
                    )

        def widths(self) -> tuple[int, ...]:
            """Channels of the levels, from the pixels down."""
            return tuple(self.ch * m for m in self.ch_mult)

        def down_factors(self) -> tuple[tuple[int, int], ...]:
            """What each level of the encoder divides (time, space) by."""
            return (*(DOWN_BLOCKS[b] for b in self.down_block_types[:-1]), (1, 1))

        def up_factors(self) -> tuple[tuple[int, int], ...]:
            """What each level of the decoder multiplies (time, space) by."""
            return (*(UP_BLOCKS[b] for b in self.up_block_types[:-1]), (1, 1))

        def factors(self) -> tuple[int, int]:
            """What the whole encoder divides (time, space) by."""
            time, space = zip(*self.down_factors(), strict=True)
            return prod(time), prod(space)

        def latents(self, clip: Clip) -> Clip:
            """Slices of latents for slices of frames, and one for a first frame that is over."""
            if clip.channels != 3:
                raise Misfit("channels", clip.channels, "3")
            _, space = self.factors()
            must_divide("height", clip.height, space)
            must_divide("width", clip.width, space)
            slices, rest = divmod(clip.frames, self.mini_batch_encoder)
            if self.mini_batch_decoder == 1:  # else one latent could be a slice or a picture
                allowed, also = (1,), ""
            else:
                allowed, also = (0, 1), f", or {self.mini_batch_encoder} k"
            if clip.frames < 1 or rest not in allowed:
                rule = f"{self.mini_batch_encoder} k + 1{also}, in whole slices"
                raise Misfit("frames", clip.frames, rule)
            frames = slices * self.mini_batch_decoder + rest
            return Clip(self.latent_channels, frames, clip.height // space, clip.width // space)

        def recipe(self) -> FirstStageRecipe:
            """That of magvit; 22 dB on moving digits after 150 of its steps."""
            return FirstStageRecipe(
                lr=1e-3,
                steps=600,
                batch_size=8,
                reconstruction={"l1_weight": 0.0, "l2_weight": 1.0},
            )

        def regularizer(self) -> str:
            return "kl"

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
        """x (B, 3, T, H, W) in [-1, 1], T = 8 k or 8 k + 1; raises Misfit for other sizes."""
        self.cfg.latents(Clip(*x.shape[1:]))
        size, latents = self.tile_sizes()
        return Gaussian(self.per_tile(self.moments, x, size, latents))

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
