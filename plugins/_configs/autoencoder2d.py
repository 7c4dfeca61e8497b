"""Base Config of latent diffusion's two first stages (`vae=kl`, `vae=vq`)."""

from collections.abc import Iterator
from dataclasses import dataclass
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
)


@dataclass
class Autoencoder2DConfig(FirstStageConfig):
    """Encoder and decoder of single frames, in levels that halve the size; published names."""

    may_differ: ClassVar[tuple[str, ...]] = (
        *FirstStageConfig.may_differ,
        "dropout",
        "train_frames",
        "frames_per_pass",
    )

    embed_dim: int = 4  # latent channels
    ch: int = 16
    ch_mult: tuple[int, ...] = (1, 2, 2)  # channels per level, in units of ch
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()  # the middle block always has attention
    resolution: int = 16  # image size that attn_resolutions refer to; images may have any size
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    dropout: float = 0.0
    num_groups: int = 8  # of the group norms; 32 as published
    scale_factor: float | None = None  # of the latents; null: measured per channel
    shift: float | None = None  # subtracted before scaling; null: measured per channel
    train_frames: int | None = 1  # random frames per clip in a training step; null: all
    frames_per_pass: int | None = None  # frames per forward pass; null: all

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in ("embed_dim", "ch", "num_res_blocks", "z_channels", "num_groups"):
            yield from in_range(name, getattr(self, name), 1)
        yield from one_of("in_channels", self.in_channels, [3])
        yield from one_of("out_ch", self.out_ch, [3])
        yield from in_range("dropout", self.dropout, 0, 0.99)
        yield from above("scale_factor", self.scale_factor, 0)
        yield from in_range("shift", self.shift, -100, 100)
        yield from in_range("train_frames", self.train_frames, 1)
        yield from in_range("frames_per_pass", self.frames_per_pass, 1)
        if not self.ch_mult or min(self.ch_mult) < 1:
            yield f"ch_mult={self.ch_mult}: want at least one level, each >= 1"
        elif self.num_groups > 0 and any(self.ch * m % self.num_groups for m in self.ch_mult):
            widths = [self.ch * m for m in self.ch_mult]
            yield f"num_groups={self.num_groups}: want a divisor of all widths {widths}"
        levels = [self.resolution // 2**i for i in range(len(self.ch_mult))]
        if unknown := set(self.attn_resolutions) - set(levels):
            yield f"attn_resolutions={sorted(unknown)}: want some of {levels}, by resolution"

    def latents(self, clip: Clip) -> Clip:
        if clip.channels != self.in_channels:
            raise Misfit("channels", clip.channels, str(self.in_channels))
        f = 2 ** (len(self.ch_mult) - 1)
        must_divide("height", clip.height, f)
        must_divide("width", clip.width, f)
        return Clip(self.embed_dim, clip.frames, clip.height // f, clip.width // f)

    def recipe(self) -> FirstStageRecipe:
        return FirstStageRecipe(lr=4e-3 * min(1.0, 16 / self.ch), steps=1200)
