"""The deep-compression autoencoder DC-AE, frame by frame (Chen et al. 2024, 2410.10733).

It divides the size by 32 to 128, for many channels; Sana (2410.10629) uses it. Parameter names are
those of the released weights in diffusers, and the settings those of its config.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from plugins._blocks.autoencoder2d import per_frame
from plugins._blocks.dc_autoencoder import Decoder, Encoder, from_official
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import PointPosterior
from sandbox.contracts import (
    Clip,
    FirstStageConfig,
    FirstStageRecipe,
    SizeError,
    State,
    above,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

BLOCKS = ("ResBlock", "EfficientViTBlock")
CHOICES = {
    "downsample_block_type": ("conv", "pixel_unshuffle"),
    "upsample_block_type": ("interpolate", "pixel_shuffle"),
}
CHOICES_OF_LEVELS = {
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "decoder_norm_types": ("rms_norm", "batch_norm"),
    "decoder_act_fns": ("silu", "relu"),
}


@dataclass
class Level:
    """Blocks of one level. scale: kernel size of the attention's second scale, 0 for none."""

    block: str
    width: int
    layers: int
    scale: int
    norm: str = "rms_norm"
    act: str = "silu"


@register("vae", "dc_ae")
class AutoencoderDC(FirstStage):
    """2-D autoencoder of Sana (DC-AE): 32 to 128x in space, latents without noise."""

    @dataclass
    class Config(FirstStageConfig):
        """Settings of a released config.json under their names.

        Lists have one entry per level, from the highest resolution, or one for all levels. A level
        halves the size of the one before it; a first level without layers is one convolution.
        *_qkv_multiscales: kernel size of the second scale of the attention, 0 for none.
        scaling_factor: of the latents; null measures a scale and a shift per channel.
        train_frames: random frames per clip in a training step; null: all.
        frames_per_pass: frames per forward pass; null: all.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            *FirstStageConfig.may_differ,
            "train_frames",
            "frames_per_pass",
        )

        latent_channels: int = 16
        attention_head_dim: int = 8
        encoder_block_types: tuple[str, ...] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        decoder_block_types: tuple[str, ...] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        encoder_block_out_channels: tuple[int, ...] = (16, 32, 32)
        decoder_block_out_channels: tuple[int, ...] = (16, 32, 32)
        encoder_layers_per_block: tuple[int, ...] = (1, 1, 1)
        decoder_layers_per_block: tuple[int, ...] = (1, 1, 1)
        encoder_qkv_multiscales: tuple[int, ...] = (0, 0, 3)
        decoder_qkv_multiscales: tuple[int, ...] = (0, 0, 3)
        downsample_block_type: str = "pixel_unshuffle"
        upsample_block_type: str = "pixel_shuffle"
        decoder_norm_types: tuple[str, ...] = ("rms_norm",)
        decoder_act_fns: tuple[str, ...] = ("silu",)
        scaling_factor: float | None = None
        train_frames: int | None = 1
        frames_per_pass: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("latent_channels", "attention_head_dim", "train_frames",
                         "frames_per_pass"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            yield from above("scaling_factor", self.scaling_factor, 0)
            for name, choices in CHOICES.items():
                yield from one_of(name, getattr(self, name), choices)
            for name, choices in CHOICES_OF_LEVELS.items():
                for value in dict.fromkeys(getattr(self, name)):
                    yield from one_of(name, value, choices)
            if len(self.encoder_block_out_channels) != len(self.decoder_block_out_channels):
                number = len(self.encoder_block_out_channels)
                yield f"decoder_block_out_channels: want {number} levels, as in the encoder"
            for part in ("encoder", "decoder"):
                yield from self.level_problems(part)

        def level_problems(self, part: str) -> Iterator[str]:
            """Problems with the levels of the "encoder" or "decoder"."""
            widths = getattr(self, f"{part}_block_out_channels")
            layers = getattr(self, f"{part}_layers_per_block")
            if len(widths) < 2 or min(widths) < 1:
                yield f"{part}_block_out_channels={list(widths)}: want two levels, each >= 1"
                return
            names = ["block_types", "layers_per_block", "qkv_multiscales"]
            names = [f"{part}_{name}" for name in names]
            names += ["decoder_norm_types", "decoder_act_fns"] if part == "decoder" else []
            wrong = [n for n in names if len(getattr(self, n)) not in (1, len(widths))]
            for name in wrong:
                have = len(getattr(self, name))
                yield f"{name}: has {have} entries; want one, or {len(widths)}, one per level"
            if wrong:
                return
            if min(layers) < 0 or 0 in layers[1:] or layers == (0,):
                yield f"{part}_layers_per_block={list(layers)}: want >= 1; the first may be 0"
                return
            for scale in dict.fromkeys(getattr(self, f"{part}_qkv_multiscales")):
                if scale < 0 or (scale and scale % 2 == 0):
                    yield f"{part}_qkv_multiscales={scale}: want 0 or an odd kernel size"
            yield from self.width_problems(part)

        def width_problems(self, part: str) -> Iterator[str]:
            """The shortcuts need widths that divide each other."""
            name, levels = f"{part}_block_out_channels", self.levels(part)
            unshuffles = part == "encoder" and self.downsample_block_type == "pixel_unshuffle"
            for level, following in pairwise(levels):
                if level.layers and 4 * level.width % following.width:
                    want = f"want a divisor of {4 * level.width}, four times the width before"
                    yield f"{name}: {following.width} channels after {level.width}: {want}"
                if unshuffles and following.width % 4:
                    want = "want a multiple of 4 with downsample_block_type=pixel_unshuffle"
                    yield f"{name}: {following.width} channels: {want}"
            if self.latent_channels > 0 and levels[-1].width % self.latent_channels:
                yield f"{name}: want a multiple of latent_channels={self.latent_channels} at last"
            for level in levels:
                wide = level.width >= self.attention_head_dim
                if level.block == "EfficientViTBlock" and level.layers and not wide:
                    want = f"want at least attention_head_dim={self.attention_head_dim}"
                    yield f"{name}: {level.width} channels with EfficientViTBlock: {want}"

        def levels(self, part: str) -> tuple[Level, ...]:
            """Levels of the "encoder" or "decoder", from the highest resolution."""
            widths = getattr(self, f"{part}_block_out_channels")
            names = ["block_types", "layers_per_block", "qkv_multiscales"]
            lists = [getattr(self, f"{part}_{name}") for name in names]
            if part == "decoder":
                lists += [self.decoder_norm_types, self.decoder_act_fns]
            per_level = [x if len(x) > 1 else x * len(widths) for x in lists]
            return tuple(
                Level(block, width, *rest)
                for width, block, *rest in zip(widths, *per_level, strict=True)
            )

        def space(self) -> int:
            """Downsampling factor in space."""
            return 2 ** (len(self.encoder_block_out_channels) - 1)

        def latents(self, clip: Clip) -> Clip:
            if clip.channels != 3:
                raise SizeError("channels", clip.channels, "3")
            must_divide("height", clip.height, self.space())
            must_divide("width", clip.width, self.space())
            height, width = clip.height // self.space(), clip.width // self.space()
            return Clip(self.latent_channels, clip.frames, height, width)

        def recipe(self) -> FirstStageRecipe:
            return FirstStageRecipe(lr=2e-3, steps=1000)

    def __init__(self, cfg: Config) -> None:
        shift = None if cfg.scaling_factor is None else 0.0
        super().__init__(cfg.latent_channels, cfg.scaling_factor, shift)
        self.cfg, self.train_frames = cfg, cfg.train_frames
        sizes = cfg.latent_channels, cfg.attention_head_dim
        unshuffle = cfg.downsample_block_type == "pixel_unshuffle"
        self.encoder = Encoder(cfg.levels("encoder"), *sizes, unshuffle)
        interpolate = cfg.upsample_block_type == "interpolate"
        self.decoder = Decoder(cfg.levels("decoder"), *sizes, interpolate)

    def from_official(self, state: State) -> State:
        """Translates weights of the official repository; returns others unchanged."""
        return from_official(state)

    def from_published(self, state: State) -> State:
        return self.from_official(state)

    def encode(self, x: Tensor) -> PointPosterior:
        """x (B, 3, T, H, W) in [-1, 1]; raises SizeError for sizes without whole latent cells."""
        self.cfg.latents(Clip(*x.shape[1:]))
        return PointPosterior(per_frame(self.encoder, x, self.cfg.frames_per_pass))

    def posterior(self, stored: Tensor) -> PointPosterior:
        return PointPosterior(stored)

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, T, h, w) -> (B, 3, T, H, W), not clamped."""
        return per_frame(self.decoder, z, self.cfg.frames_per_pass)
