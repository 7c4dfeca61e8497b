"""The first stage of CogVideoX (Yang et al. 2024, 2408.06072): 4x in time, 8x in space, causal.

Parameter names are those of the released weights (diffusers layout, folder vae/), settings those of
its config.json. `encode` and `decode` include the steps of the published pipeline: chunks of
frames, tiles, and one sample at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from plugins._blocks.cogvideox_autoencoder import Decoder, Encoder, FrameCache
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import Gaussian
from plugins._blocks.tiling import Tiles, apply_to_tiles
from sandbox.contracts import (
    Clip,
    ConfigError,
    FirstStageConfig,
    FirstStageRecipe,
    SizeError,
    above,
    in_range,
    must_divide,
)
from sandbox.registry import register

RELEASED = (  # settings of a released config.json
    "block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups",
    "temporal_compression_ratio", "sample_height", "sample_width", "scaling_factor",
)  # fmt: skip
FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_eps": 1e-6, "force_upcast": True,
    "shift_factor": None, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
START_LOG_VARIANCE = -6.0  # initially little noise on latents of magnitude about 1


@register("vae", "cogvideox")
class AutoencoderCogVideoX(FirstStage):
    """Causal 3-D VAE of CogVideoX: 4 frames per latent frame, 1 for the first."""

    @dataclass
    class Config(FirstStageConfig):
        """Settings of a released config.json under their names, chunks and tiles.

        num_sample_frames_batch_size, num_latent_frames_batch_size: pixel and latent frames per
        chunk; the first chunk also takes the remainder. They change the output, because group norms
        cover one chunk. scaling_factor: of the latents; null measures a scale and a shift per
        channel. use_tiling: for frames larger than a tile; changes the latents slightly.
        use_slicing: one sample at a time. tile_sample_min_*: size of a tile in pixels; null: half
        of sample_*. tile_overlap_factor_*: share of a tile that overlaps with the next.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            *FirstStageConfig.may_differ,
            "sample_height",
            "sample_width",
            "use_slicing",
            "use_tiling",
            "tile_sample_min_height",
            "tile_sample_min_width",
            "tile_overlap_factor_height",
            "tile_overlap_factor_width",
        )

        block_out_channels: tuple[int, ...] = (16, 32, 32)  # per level, each of half the size
        layers_per_block: int = 1  # residual blocks per level; the decoder has one more
        latent_channels: int = 16
        norm_num_groups: int = 4
        temporal_compression_ratio: int = 4
        sample_height: int = 16
        sample_width: int = 16
        scaling_factor: float | None = None
        num_sample_frames_batch_size: int = 8
        num_latent_frames_batch_size: int = 2
        use_slicing: bool = False
        use_tiling: bool = False
        tile_sample_min_height: int | None = None
        tile_sample_min_width: int | None = None
        tile_overlap_factor_height: float = 1 / 6
        tile_overlap_factor_width: float = 1 / 5

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("layers_per_block", "latent_channels", "norm_num_groups", "sample_height",
                         "sample_width", "tile_sample_min_height", "tile_sample_min_width",
                         "num_sample_frames_batch_size"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("tile_overlap_factor_height", "tile_overlap_factor_width"):
                yield from in_range(name, getattr(self, name), 0, 0.5)
            yield from above("scaling_factor", self.scaling_factor, 0)
            widths, groups = self.block_out_channels, self.norm_num_groups
            if not widths or min(widths) < 1:
                yield f"block_out_channels={widths}: want at least one level, each >= 1"
            elif groups > 0 and any(w % groups for w in widths):
                yield f"norm_num_groups={groups}: want a divisor of all widths {list(widths)}"
            ratio, levels = self.temporal_compression_ratio, len(widths) - 1
            if ratio < 1 or ratio & (ratio - 1) or ratio > 2 ** max(levels, 0):
                yield (
                    f"temporal_compression_ratio={ratio}: want a power of 2 that is at most "
                    f"{2 ** max(levels, 0)}, the ratio in space"
                )
            elif self.num_latent_frames_batch_size < 2 or self.num_latent_frames_batch_size % 2:
                yield (
                    f"num_latent_frames_batch_size={self.num_latent_frames_batch_size}: want an "
                    "even number >= 2"
                )
            elif self.num_sample_frames_batch_size != ratio * self.num_latent_frames_batch_size:
                yield (
                    f"num_sample_frames_batch_size={self.num_sample_frames_batch_size}: want "
                    f"{ratio * self.num_latent_frames_batch_size}, the pixel frames of "
                    f"num_latent_frames_batch_size={self.num_latent_frames_batch_size}"
                )
            if self.use_tiling and widths:
                yield from self.tile_problems()

        def tile_problems(self) -> Iterator[str]:
            for name in ("height", "width"):
                size, small = self.tile(name)
                share = getattr(self, f"tile_overlap_factor_{name}")
                if size < 1 or small < 1 or not 0 <= share <= 0.5:
                    want = f"at least {self.space()} pixels, the size of a latent cell"
                    yield f"tile_sample_min_{name}={size}: want {want}"
                elif int(size * (1 - share)) != self.space() * (small - int(small * share)):
                    yield (
                        f"tile_overlap_factor_{name}={share}: tiles of {size} pixels ({small} "
                        "latents) must overlap by an integer number of latents"
                    )

        def space(self) -> int:
            """Downsampling factor in space."""
            return 2 ** (len(self.block_out_channels) - 1)

        def tile(self, name: str) -> tuple[int, int]:
            """Size of a tile along "height" or "width", in pixels and in latents."""
            stated = getattr(self, f"tile_sample_min_{name}")
            size = getattr(self, f"sample_{name}") // 2 if stated is None else stated
            return size, int(size / self.space())

        def factors(self) -> tuple[tuple[int, int], ...]:
            """Resampling factors (time, space) of the levels, in the order of either network."""
            in_time = self.temporal_compression_ratio.bit_length() - 1
            steps = len(self.block_out_channels) - 1
            return (*((2 if i < in_time else 1, 2) for i in range(steps)), (1, 1))

        def latents(self, clip: Clip) -> Clip:
            """For clips that decode to the same number of frames: 1 plus a multiple of a chunk."""
            if clip.channels != 3:
                raise SizeError("channels", clip.channels, "3")
            must_divide("height", clip.height, self.space())
            must_divide("width", clip.width, self.space())
            chunk = self.num_sample_frames_batch_size
            if clip.frames < 1 or (clip.frames - 1) % chunk:
                raise SizeError("frames", clip.frames, f"1 plus a multiple of {chunk}")
            frames = (clip.frames - 1) // self.temporal_compression_ratio + 1
            height, width = clip.height // self.space(), clip.width // self.space()
            return Clip(self.latent_channels, frames, height, width)

        def diffusers_config(self) -> dict[str, Any]:
            if self.scaling_factor is None:
                raise ConfigError("scaling_factor=None: want a number; diffusers has no shift")
            if self.num_latent_frames_batch_size != 2:
                number = self.num_latent_frames_batch_size
                raise ConfigError(f"num_latent_frames_batch_size={number}: want 2, as in diffusers")
            levels = len(self.block_out_channels)
            own = {name: getattr(self, name) for name in RELEASED}
            return {
                "_class_name": "AutoencoderKLCogVideoX",
                **own,
                **FIXED,
                "down_block_types": ["CogVideoXDownBlock3D"] * levels,
                "up_block_types": ["CogVideoXUpBlock3D"] * levels,
            }

        def recipe(self) -> FirstStageRecipe:
            return FirstStageRecipe(
                lr=2e-3,
                steps=600,
                batch_size=8,
                reconstruction={"l1_weight": 0.0, "l2_weight": 1.0},
            )

    def __init__(self, cfg: Config) -> None:
        shift = None if cfg.scaling_factor is None else 0.0
        super().__init__(cfg.latent_channels, cfg.scaling_factor, shift)
        self.cfg = cfg
        sizes, layers = cfg.block_out_channels, cfg.layers_per_block
        others = cfg.latent_channels, cfg.norm_num_groups
        self.encoder = Encoder(sizes, cfg.factors(), layers, *others)
        self.decoder = Decoder(sizes[::-1], cfg.factors(), layers + 1, *others)
        with torch.no_grad():
            bias = self.encoder.conv_out.conv.get_parameter("bias")
            bias[cfg.latent_channels :] = START_LOG_VARIANCE

    def encode(self, x: Tensor) -> Gaussian:
        """x (B, 3, T, H, W) in [-1, 1]; any T as published, while `latents` restricts it."""
        must_divide("height", x.shape[3], self.cfg.space())
        must_divide("width", x.shape[4], self.cfg.space())
        rows, columns = (self.tiles(name, to_latents=True) for name in ("height", "width"))
        return Gaussian(self.per_tile(self.moments, x, rows, columns))

    def posterior(self, stored: Tensor) -> Gaussian:
        return Gaussian(stored)

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, C, t, h, w) -> (B, 3, T, H, W), not clamped."""
        rows, columns = (self.tiles(name, to_latents=False) for name in ("height", "width"))
        return self.per_tile(self.frames, z, rows, columns)

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, t, h, w), chunk by chunk."""
        return self.per_chunk(self.encoder, x, self.cfg.num_sample_frames_batch_size)

    def frames(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of unscaled latents, chunk by chunk."""
        return self.per_chunk(self.decoder, z, self.cfg.num_latent_frames_batch_size)

    @staticmethod
    def per_chunk(network: Callable[[Tensor, FrameCache], Tensor], x: Tensor, size: int) -> Tensor:
        """Applies `network` to chunks of `size` frames; the first also takes the remainder."""
        cache: FrameCache = {}
        number = max(x.shape[2] // size, 1)
        first = x.shape[2] - (number - 1) * size
        chunks = x.split([first, *[size] * (number - 1)], 2)
        return torch.cat([network(chunk, cache) for chunk in chunks], 2)

    def per_tile(
        self, fn: Callable[[Tensor], Tensor], x: Tensor, rows: Tiles, columns: Tiles
    ) -> Tensor:
        """fn(x), in tiles with `use_tiling` and one sample at a time with `use_slicing`."""
        if self.cfg.use_slicing and x.shape[0] > 1:
            return torch.cat([self.per_tile(fn, one, rows, columns) for one in x.split(1)])
        is_large = x.shape[3] > rows.size or x.shape[4] > columns.size
        return apply_to_tiles(fn, x, rows, columns) if self.cfg.use_tiling and is_large else fn(x)

    def tiles(self, name: str, to_latents: bool) -> Tiles:
        """Tiles along "height" or "width": of pixels for encoding, of latents for decoding."""
        share = getattr(self.cfg, f"tile_overlap_factor_{name}")
        size, out = self.cfg.tile(name) if to_latents else self.cfg.tile(name)[::-1]
        blend = int(out * share)
        return Tiles(size, int(size * (1 - share)), out - blend, blend)
