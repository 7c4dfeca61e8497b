"""UNet of latent diffusion for images (Rombach et al. 2022, 2112.10752), published names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.motion import MotionModule
from plugins._blocks.unet import AttentionBlock, ConditionedLayer, LayerInputs, UNet
from plugins._blocks.unet_attention import SpatialTransformer
from plugins._configs.backbone import (
    MOTION_MODULES,
    attention_widths,
    divisor_problems,
    has_levels,
    level_problems,
    middle_block,
    motion_setting_problems,
    motion_width_problems,
    slots_taken,
)
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Hidden,
    SizeError,
    Slots,
    in_range,
    must_divide,
)
from sandbox.registry import register

MOTION_FRAMES = 4096  # frame positions of a motion module, as published


@register("backbone", "unet2d")
class UNet2D(UNet):
    """Image UNet of latent diffusion: attention blocks, or spatial transformers with a context."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters: small sizes, and the published default of the rest.

        attention_resolutions: downsampling factors (not sizes) with attention; the middle block
        always has it. num_head_channels: width of a head; -1 uses num_heads instead.
        num_heads_upsample: number of heads in output blocks; -1 uses num_heads; as published,
        legacy=false ignores it. use_new_attention_order: order of q, k and v in `qkv`.
        use_spatial_transformer: cross-attention to context tokens; null: wherever there are tokens.
        image_size has no effect: any size that divides by the downsampling works.

        motion_module: temporal attention after each spatial attention, with motion_heads heads:
        "vanilla" (per position) or "grid" (over blocks of motion_block_size x motion_block_size).
        It starts at zero, so an image network initially computes the same function on every frame.

        null: wiring fills it; 0: none. in_channels counts the latents and `concat`.
        adm_in_channels: width of a vector condition that is added to the time embedding, as named
        in Stability's models; published latent diffusion has none.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("image_size", "dropout", "use_checkpoint")

        image_size: int | None = None
        in_channels: int | None = None
        out_channels: int | None = None
        model_channels: int = 64
        attention_resolutions: tuple[int, ...] = (2,)
        num_res_blocks: int = 1
        channel_mult: tuple[int, ...] = (1, 1)
        num_heads: int = 4
        num_head_channels: int = -1
        num_heads_upsample: int = -1
        dropout: float = 0.0
        conv_resample: bool = True
        use_scale_shift_norm: bool = False
        resblock_updown: bool = False
        use_new_attention_order: bool = False
        legacy: bool = True
        use_spatial_transformer: bool | None = None
        transformer_depth: int = 1
        context_dim: int | None = None
        adm_in_channels: int | None = None
        use_checkpoint: bool = False
        motion_module: str = "none"
        motion_block_size: int = 2
        motion_heads: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("image_size", "in_channels", "out_channels", "num_res_blocks",
                         "transformer_depth"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("context_dim", "adm_in_channels"):
                yield from in_range(name, getattr(self, name), 0)
            yield from in_range("dropout", self.dropout, 0, 0.99)
            yield from level_problems(self)
            widths = attention_widths(self) if has_levels(self) else []
            yield from self.head_problems(widths)
            yield from self.motion_problems(widths)
            if self.use_spatial_transformer and self.context_dim == 0:
                yield "use_spatial_transformer=True: want context_dim > 0, or false"
            if self.use_spatial_transformer is False and self.context_dim:
                yield "use_spatial_transformer=False: want true, or context_dim=0"

        def motion_problems(self, widths: list[int]) -> Iterator[str]:
            yield from motion_setting_problems(self)
            if self.motion_module not in MOTION_MODULES[1:] or self.motion_heads < 1:
                return
            for width in widths:
                yield from motion_width_problems(width, self.motion_heads)

        def head_problems(self, widths: list[int]) -> Iterator[str]:
            if self.num_head_channels != -1:
                yield from divisor_problems("num_head_channels", self.num_head_channels, widths)
                return
            yield from divisor_problems("num_heads", self.num_heads, widths)
            if self.num_heads_upsample != -1:
                yield from divisor_problems("num_heads_upsample", self.num_heads_upsample, widths)

        def has_context(self) -> bool:
            return bool(self.context_dim) or bool(self.use_spatial_transformer)

        def takes(self) -> frozenset[str]:
            return slots_taken(
                context=self.context_dim != 0 and self.use_spatial_transformer is not False,
                vector=self.adm_in_channels != 0,
                concat=True,
            )

        def grid(self, z: Clip) -> Clip:
            if self.motion_module == "none" and z.frames != 1:
                raise SizeError("frames", z.frames, "1 for images, or set motion_module for clips")
            if z.frames > MOTION_FRAMES:
                raise SizeError("frames", z.frames, f"at most {MOTION_FRAMES}")
            block = self.motion_block_size if self.motion_module == "grid" else 1
            for name in ("height", "width"):
                must_divide(name, getattr(z, name), 2 ** (len(self.channel_mult) - 1) * block)
            return z

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            if slots.context and slots.context.frames != 1:
                frames = slots.context.frames
                raise ConfigError(f"unet2d: context has tokens for {frames} frames: want one set")
            context = slots.context if "context" in self.takes() else None
            return self.agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                use_spatial_transformer=context is not None,
                context_dim=context.width if context else 0,
                adm_in_channels=slots.vector if "vector" in self.takes() else 0,
            )

        def blocks(self) -> tuple[str, ...]:
            return ("middle_block",)

        def hidden(self, block: str) -> Hidden | None:
            return middle_block(self) if block in self.blocks() else None

        def adapter_targets(self) -> tuple[str, ...]:
            tokens = ("to_q", "to_k", "to_v", "to_out.0")
            if self.has_context():
                return tokens
            return ("qkv", "proj_out", *(tokens if self.motion_module != "none" else ()))

        def has_matrices(self) -> bool:
            return self.has_context() or self.motion_module != "none"

        def additions(self) -> tuple[str, ...]:
            return (".motion_module.",)

    cfg: Config  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in the base

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)

    def attention(self, width: int, output: bool = False) -> list[nn.Module]:
        s = self.cfg
        heads = s.num_heads
        if s.num_head_channels != -1:
            heads = width // s.num_head_channels
        elif output and s.legacy and not s.has_context() and s.num_heads_upsample != -1:
            heads = s.num_heads_upsample
        if s.has_context():
            depth, dim = s.transformer_depth, s.context_dim or 0
            layer: ConditionedLayer = SpatialTransformer(
                width, heads, width // heads, depth, dim, use_checkpoint=s.use_checkpoint
            )
        else:
            layer = AttentionBlock(width, heads, s.use_new_attention_order, s.use_checkpoint)
        if s.motion_module != "none":
            block_size = s.motion_block_size if s.motion_module == "grid" else 1
            layer.motion_module = MotionModule(
                width, s.motion_heads, block_size=block_size, max_frames=MOTION_FRAMES
            )
        return [layer]

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) -> (B, out_channels, T, H, W).

        T is 1 without a motion module. Raises ValueError for inputs that do not match the settings,
        SizeError for sizes.
        """
        z = self.checked(z_t, cond)
        self.cfg.grid(Clip(*z.shape[1:]))
        if cond.image_context is not None or cond.scalars:
            names = [name for name, _ in cond.tensors() if name in ("image_context", *cond.scalars)]
            raise ValueError(f"backbone=unet2d takes no {', '.join(names)}")
        frames = z.shape[2]
        emb = self.embedding(z_t, t, cond)
        inputs = LayerInputs(emb, frames, cond.context, cond.context_mask)
        out = self.run(rearrange(z, "b c t h w -> (b t) c h w"), inputs)
        return rearrange(out, "(b t) c h w -> b c t h w", t=frames)
