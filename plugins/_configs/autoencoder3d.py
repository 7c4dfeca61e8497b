"""Base Config of EasyAnimate's two first stages (`vae=magvit`, `vae=slice`)."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from sandbox.contracts import (
    Clip,
    FirstStageConfig,
    FirstStageRecipe,
    Misfit,
    above,
    in_range,
    must_divide,
    one_of,
    same_length,
)

# Factors (time, space) of a block. As published, the last block of a network keeps the size.
DOWN_BLOCKS = {"SpatialDownBlock3D": (1, 2), "SpatialTemporalDownBlock3D": (2, 2)}
UP_BLOCKS = {"SpatialUpBlock3D": (1, 2), "SpatialTemporalUpBlock3D": (2, 2)}
ATTENTIONS = ("3d", "spatial")
STARTS = ("published", "haar")


@dataclass
class Autoencoder3DConfig(FirstStageConfig):
    """Encoder and decoder in levels that halve the size in space, and some of them in time.

    Subclasses define how clips are split in time (`window_problems`, `latent_frames`).
    """

    may_differ: ClassVar[tuple[str, ...]] = (
        *FirstStageConfig.may_differ,
        "use_tiling",
        "tile_sample_min_size",
        "tile_overlap_factor",
        "start",
    )

    ch: int = 16
    ch_mult: tuple[int, ...] = (1, 2, 2)  # channels per level, in units of ch
    down_block_types: tuple[str, ...] = ("SpatialTemporalDownBlock3D",) * 3
    up_block_types: tuple[str, ...] = ("SpatialTemporalUpBlock3D",) * 3
    layers_per_block: int = 1  # residual blocks per level; the decoder has one more
    latent_channels: int = 16
    norm_num_groups: int = 4  # 32 as published
    mid_block_use_attention: bool = True
    mid_block_attention_type: str = "3d"  # over space and time, or "spatial": within a frame
    mid_block_num_attention_heads: int = 1
    mini_batch_encoder: int = 9  # pixel frames that are encoded together
    mini_batch_decoder: int = 3  # latent frames that are decoded together
    use_tiling: bool = False  # for frames larger than a tile
    tile_sample_min_size: int = 256  # height and width of a tile in pixels
    tile_overlap_factor: float = 0.25
    scale_factor: float | None = None  # of the latents; null: measured per channel
    shift: float | None = None  # subtracted before scaling; null: measured per channel
    start: str = "haar"  # initial weights: "haar", or "published" (random)

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
        yield from self.level_problems()

    def level_problems(self) -> Iterator[str]:
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
                f"start='haar' with {list(widths)} channels and {self.latent_channels} latent "
                "channels: want two levels of 6 channels and 3 latent channels, or 'published'"
            )
        known = set(self.down_block_types) <= set(DOWN_BLOCKS)
        if known and set(self.up_block_types) <= set(UP_BLOCKS):
            yield from self.factor_problems()

    def factor_problems(self) -> Iterator[str]:
        time, space = down = self.factors()
        up = tuple(map(prod, zip(*self.up_factors(), strict=True)))
        if up != down:
            yield (
                f"up_block_types multiply (time, space) by {up}: want {down}, the factors of "
                "down_block_types (the last block of each keeps the size)"
            )
        yield from self.window_problems(time)
        size, overlap = self.tile_sample_min_size, self.tile_overlap_factor
        if size > 0 and size % space:
            yield f"tile_sample_min_size={size}: want a multiple of {space}"
        elif size > 0 and 0 < overlap <= 0.5:
            shared = size // space * overlap
            if abs(shared - round(shared)) > 1e-6:
                yield (
                    f"tile_overlap_factor={overlap}: tiles of {size // space} latents must overlap "
                    f"by an integer number of latents, not {shared:g}"
                )

    @abstractmethod
    def window_problems(self, time: int) -> Iterator[str]:
        """Problems of `mini_batch_encoder` and `mini_batch_decoder` for the time factor `time`."""

    @abstractmethod
    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames`; raises Misfit for unsupported numbers."""

    def widths(self) -> tuple[int, ...]:
        """Channels of the levels, from the highest resolution."""
        return tuple(self.ch * m for m in self.ch_mult)

    def down_factors(self) -> tuple[tuple[int, int], ...]:
        """Factors by which each level of the encoder divides (time, space)."""
        return (*(DOWN_BLOCKS[b] for b in self.down_block_types[:-1]), (1, 1))

    def up_factors(self) -> tuple[tuple[int, int], ...]:
        """Factors by which each level of the decoder multiplies (time, space)."""
        return (*(UP_BLOCKS[b] for b in self.up_block_types[:-1]), (1, 1))

    def factors(self) -> tuple[int, int]:
        """Factors by which the encoder divides (time, space)."""
        time, space = zip(*self.down_factors(), strict=True)
        return prod(time), prod(space)

    def latents(self, clip: Clip) -> Clip:
        if clip.channels != 3:
            raise Misfit("channels", clip.channels, "3")
        _, space = self.factors()
        must_divide("height", clip.height, space)
        must_divide("width", clip.width, space)
        frames = self.latent_frames(clip.frames)
        return Clip(self.latent_channels, frames, clip.height // space, clip.width // space)

    def recipe(self) -> FirstStageRecipe:
        """Squared error: 26 dB for MagViT after 60 CPU seconds on moving digits, 22 dB for slices
        after 150 steps. The absolute error alone stays at 16 dB.
        """
        return FirstStageRecipe(
            lr=1e-3,
            steps=600,
            batch_size=8,
            reconstruction={"l1_weight": 0.0, "l2_weight": 1.0},
        )

    def regularizer(self) -> str:
        return "kl"
