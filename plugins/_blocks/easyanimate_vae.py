"""Base class of EasyAnimate's two 3-D first stages (`vae=magvit`, `vae=slice`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from plugins._blocks.autoencoder3d import BlockSettings, Decoder3D, Encoder3D
from plugins._blocks.first_stage import FirstStage
from plugins._blocks.haar import init_linear
from plugins._blocks.inflate import inflate, is_2d
from plugins._blocks.posterior import Gaussian
from plugins._blocks.tiling import apply_tiled
from sandbox.contracts import State


class Sizes(Protocol):
    """Settings of the Configs of `magvit` and `slice` that the networks and tiles read."""

    latent_channels: int
    layers_per_block: int
    norm_num_groups: int
    mid_block_use_attention: bool
    mid_block_attention_type: str
    mid_block_num_attention_heads: int
    use_tiling: bool
    tile_sample_min_size: int
    tile_overlap_factor: float
    scale_factor: float | None
    shift: float | None
    start: str

    def widths(self) -> tuple[int, ...]: ...
    def down_factors(self) -> tuple[tuple[int, int], ...]: ...
    def up_factors(self) -> tuple[tuple[int, int], ...]: ...
    def factors(self) -> tuple[int, int]: ...


class EasyAnimateVAE(FirstStage):
    """Networks, weight conversion and tiling. Subclasses split a clip into windows or slices."""

    def __init__(self, cfg: Sizes, causal: bool) -> None:
        z = cfg.latent_channels
        super().__init__(z, cfg.scale_factor, cfg.shift)
        self.cfg = cfg
        attention = cfg.mid_block_attention_type if cfg.mid_block_use_attention else None

        def settings(layers: int) -> BlockSettings:
            groups, heads = cfg.norm_num_groups, cfg.mid_block_num_attention_heads
            return BlockSettings(layers, groups, heads, attention, causal)

        widths, layers = cfg.widths(), cfg.layers_per_block
        self.encoder = Encoder3D(widths, cfg.down_factors(), 2 * z, settings(layers))
        self.decoder = Decoder3D(widths[::-1], cfg.up_factors(), z, settings(layers + 1))
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)
        self.current_frame = -1 if causal else 1  # kernel index
        if cfg.start == "haar":
            init_linear(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)

    @abstractmethod
    def tiled_side(self, height: int, width: int) -> int:
        """The side of a frame that must exceed a tile before tiling is used."""

    def from_published(self, state: State) -> State:
        """Converts weights of a 2-D autoencoder; returns 3-D weights unchanged."""
        return inflate(state, self.current_frame) if is_2d(state) else state

    def posterior(self, stored: Tensor) -> Gaussian:
        return Gaussian(stored)

    def per_tile(self, fn: Callable[[Tensor], Tensor], x: Tensor, to_latents: bool) -> Tensor:
        """fn(x), in tiles where `use_tiling` is set and x is large enough.

        `to_latents`: fn maps pixels to latents, otherwise latents to pixels.
        """
        pixels = self.cfg.tile_sample_min_size
        latents = pixels // self.cfg.factors()[1]
        size, out = (pixels, latents) if to_latents else (latents, pixels)
        if not self.cfg.use_tiling or self.tiled_side(x.shape[-2], x.shape[-1]) <= size:
            return fn(x)
        return apply_tiled(fn, x, size, out, self.cfg.tile_overlap_factor)
