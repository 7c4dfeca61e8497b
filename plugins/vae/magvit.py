"""MagViT VAE of EasyAnimateV2 (aigc-apps/EasyAnimate, June 2024): 8x in space, 4x in time.

Parameter names and shapes are the published ones; the published size is the preset
`magvit_easyanimate_v2`. What the published pipeline does around the network happens inside `encode`
and `decode`: windows of frames, tiles of pixels, clamping, smoothing of the seams between windows.
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


@register("vae", "magvit")
class MagViT(FirstStage):
    """Causal 3-D VAE of EasyAnimateV2 (MagViT): 4 frames make one, the first stands alone."""

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
        mid_block_attention_type: str = "3d"  # over the whole clip, or "spatial": within a frame
        mid_block_num_attention_heads: int = 1
        mini_batch_encoder: int = 9  # frames of a window; nothing crosses windows
        mini_batch_decoder: int = 3  # latent frames of a window
        use_tiling: bool = False  # of pictures larger than a tile
        tile_sample_min_size: int = 256  # height and width of a tile in pixels
        tile_overlap_factor: float = 0.25
        smooth_output: bool = False  # soften the seams between windows; doubles the cost of decode
        scale_factor: float | None = None  # of the latents; None: measured, per channel
        shift: float | None = None  # taken off first; None: measured, per channel
        start: str = "haar"  # weights before training: a Haar transform, or "published": random

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in (
                "ch",
                "layers_per_block",
                "latent_channels",
                "norm_num_groups",
                "mid_block_num_attention_heads",
                "mini_batch_encoder",
                "mini_batch_decoder",
                "tile_sample_min_size",
            ):
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
            window = self.mini_batch_encoder
            if window > 0 and (window - 1) % time:
                yield f"mini_batch_encoder={window}: want 1 plus a multiple of {time}"
            elif window > 0 and self.mini_batch_decoder != (window - 1) // time + 1:
                want = (window - 1) // time + 1
                yield (
                    f"mini_batch_decoder={self.mini_batch_decoder}: want {want}, the latents of "
                    f"mini_batch_encoder={window} frames"
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
            """A picture gives one frame of latents, k windows give k times `mini_batch_decoder`."""
            if clip.channels != 3:
                raise Misfit("channels", clip.channels, "3")
            _, space = self.factors()
            must_divide("height", clip.height, space)
            must_divide("width", clip.width, space)
            windows, rest = divmod(clip.frames, self.mini_batch_encoder)
            if clip.frames != 1 and (rest or windows < 1):
                rule = f"1 or a multiple of {self.mini_batch_encoder}, the frames of a window"
                raise Misfit("frames", clip.frames, rule)
            frames = 1 if clip.frames == 1 else windows * self.mini_batch_decoder
            return Clip(self.latent_channels, frames, clip.height // space, clip.width // space)

        def recipe(self) -> FirstStageRecipe:
            """26 dB on moving digits after 60 CPU seconds; absolute error alone stays at 16 dB
            there.
            """
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
        common = (cfg.norm_num_groups, cfg.mid_block_num_attention_heads, attention)
        widths, layers = cfg.widths(), cfg.layers_per_block
        self.encoder = Encoder3D(widths, cfg.down_factors(), layers, 2 * z, *common)
        self.decoder = Decoder3D(widths[::-1], cfg.up_factors(), layers + 1, z, *common)
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)
        if cfg.start == "haar":
            start_linear(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1], T = 1 or k windows; raises Misfit for other sizes."""
        self.cfg.latents(Clip(*x.shape[1:]))
        windows = x.split(self.cfg.mini_batch_encoder, 2)
        return Gaussian(torch.cat([self.moments(window) for window in windows], 2))

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
