"""What the Configs of EasyAnimate's two first stages (`vae=magvit`, `vae=slice`) share."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from sandbox.contracts import (
    Clip,
    FirstStageConfig,
    FirstStageRecipe,
    SizeError,
    above,
    in_range,
    must_divide,
    one_of,
    same_length,
)

# What a block divides or multiplies (time, space) by; as published, the last block of a network
# keeps the size.
DOWN_BLOCKS = {"SpatialDownBlock3D": (1, 2), "SpatialTemporalDownBlock3D": (2, 2)}
UP_BLOCKS = {"SpatialUpBlock3D": (1, 2), "SpatialTemporalUpBlock3D": (2, 2)}
ATTENTIONS = ("3d", "spatial")
STARTS = ("published", "haar")


@dataclass
class Autoencoder3DConfig(FirstStageConfig):
    """An encoder and a decoder in levels that halve the size, and some of them the frames.

    A plugin says which frames the networks see at once (`problems_of_windows`, `latent_frames`).
    """

    may_differ: ClassVar[tuple[str, ...]] = (
        *FirstStageConfig.may_differ,
        "use_tiling",
        "tile_sample_min_size",
        "tile_overlap_factor",
        "start",
    )

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
    mini_batch_encoder: int = 9  # frames that the encoder sees at once
    mini_batch_decoder: int = 3  # latent frames that the decoder makes at once
    use_tiling: bool = False  # of pictures larger than a tile
    tile_sample_min_size: int = 256  # height and width of a tile in pixels
    tile_overlap_factor: float = 0.25
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
        yield from self.problems_of_windows(time)
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

    @abstractmethod
    def problems_of_windows(self, time: int) -> Iterator[str]:
        """Bad `mini_batch_encoder` and `mini_batch_decoder`; frames are divided by `time`."""

    @abstractmethod
    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of `frames` frames; raises SizeError for a refused number."""

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
        if clip.channels != 3:
            raise SizeError("channels", clip.channels, "3")
        _, space = self.factors()
        must_divide("height", clip.height, space)
        must_divide("width", clip.width, space)
        frames = self.latent_frames(clip.frames)
        return Clip(self.latent_channels, frames, clip.height // space, clip.width // space)

    def recipe(self) -> FirstStageRecipe:
        """On moving digits: MagViT 26 dB after 60 CPU seconds, slices 22 dB after 150 steps;
        absolute error alone stays at 16 dB there.
        """
        return FirstStageRecipe(
            lr=1e-3,
            steps=600,
            batch_size=8,
            reconstruction={"l1_weight": 0.0, "l2_weight": 1.0},
        )

    def regularizer(self) -> str:
        return "kl"
