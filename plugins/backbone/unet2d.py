"""UNet of latent diffusion for images (Rombach et al. 2022, 2112.10752), published names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.motion import MotionModule
from plugins._blocks.unet import AttentionBlock, Told, UNet
from plugins._blocks.unet_attention import SpatialTransformer
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    SizeError,
    Slots,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

GROUPS = 32  # of every group norm, as published
MOTION_MODULES = ("none", "vanilla", "grid")
MOTION_FRAMES = 4096  # the most that a motion module tells apart, as published


@register("backbone", "unet2d")
class UNet2D(UNet):
    """Image UNet of latent diffusion: attention blocks, or spatial transformers with context."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters; what is not a size has the published default.

        attention_resolutions: downsampling factors (not sizes) at which there is attention; the
        middle always has it. num_head_channels: width of a head, which decides instead of
        num_heads; -1 for num_heads. num_heads_upsample: heads of output blocks where num_heads
        decides, -1 for the same. legacy: false ignores num_heads_upsample, as published.
        use_new_attention_order: order of q, k and v in `qkv`. use_spatial_transformer: to be told
        tokens; null where there are any. image_size is only written down: any size that divides
        works.

        motion_module: what follows attention and makes it a network of clips: vanilla (attention
        over time at each place) or grid (in blocks of motion_block_size x motion_block_size), with
        motion_heads heads. It starts at zero: a network of pictures is unchanged on every frame.

        null is what the latents and the conditioning need, 0 is none. in_channels counts concat
        channels too. adm_in_channels: width of a vector that joins the time embedding, under the
        name of Stability's models; published latent diffusion has none.
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
            if self.model_channels < 1 or self.model_channels % GROUPS:
                yield f"model_channels={self.model_channels}: want a multiple of {GROUPS}"
            if not self.channel_mult or min(self.channel_mult) < 1:
                yield f"channel_mult={list(self.channel_mult)}: want at least one level, each >= 1"
                return
            factors = [2**i for i in range(len(self.channel_mult))]
            if unknown := set(self.attention_resolutions) - set(factors):
                yield f"attention_resolutions={sorted(unknown)}: want some of {factors}, by factor"
            yield from self.head_problems(factors)
            yield from self.motion_problems(factors)
            if self.use_spatial_transformer and self.context_dim == 0:
                yield "use_spatial_transformer=True: want context_dim > 0, or false"
            if self.use_spatial_transformer is False and self.context_dim:
                yield "use_spatial_transformer=False: want true with context_dim, which it reads"

        def attention_widths(self, factors: list[int]) -> list[int]:
            mults = zip(factors, self.channel_mult, strict=True)
            at = [m for f, m in mults if f in self.attention_resolutions] + [self.channel_mult[-1]]
            return sorted({self.model_channels * m for m in at})

        def motion_problems(self, factors: list[int]) -> Iterator[str]:
            yield from one_of("motion_module", self.motion_module, MOTION_MODULES)
            yield from in_range("motion_block_size", self.motion_block_size, 1)
            yield from in_range("motion_heads", self.motion_heads, 1)
            if self.motion_module not in MOTION_MODULES[1:] or self.motion_heads < 1:
                return
            n = self.motion_heads
            for width in self.attention_widths(factors):
                inner = width // n * n
                if width > 0 and (inner < 2 or inner % 2):
                    yield f"motion_heads={n}: {width} // {n} * {n} is {inner}; want an even number"

        def head_problems(self, factors: list[int]) -> Iterator[str]:
            widths = self.attention_widths(factors)
            counts = ("num_heads", "num_heads_upsample")
            for name in ("num_head_channels",) if self.num_head_channels != -1 else counts:
                n = getattr(self, name)
                unset = name == "num_heads_upsample" and n == -1
                if not unset and (n < 1 or any(w % n for w in widths)):
                    yield f"{name}={n}: want a divisor of all widths with attention, {widths}"

        def is_told_tokens(self) -> bool:
            return bool(self.context_dim) or bool(self.use_spatial_transformer)

        def takes(self) -> frozenset[str]:
            tokens = self.context_dim != 0 and self.use_spatial_transformer is not False
            told = {"context": tokens, "vector": self.adm_in_channels != 0, "concat": True}
            return frozenset(name for name, is_told in told.items() if is_told)

        def grid(self, z: Clip) -> Clip:
            if self.motion_module == "none" and z.frames != 1:
                raise SizeError(
                    "frames", z.frames, "1 (it is a network for images), or motion_module"
                )
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
                raise ConfigError(f"unet2d: context is for {frames} frames: want it for one image")
            context = slots.context if "context" in self.takes() else None
            return self.agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                use_spatial_transformer=context is not None,
                context_dim=context.width if context else 0,
                adm_in_channels=slots.vector if "vector" in self.takes() else 0,
            )

        def adapter_targets(self) -> tuple[str, ...]:
            tokens = ("to_q", "to_k", "to_v", "to_out.0")
            if self.is_told_tokens():
                return tokens
            return ("qkv", "proj_out", *(tokens if self.motion_module != "none" else ()))

        def has_matrices(self) -> bool:
            return self.is_told_tokens() or self.motion_module != "none"

        def additions(self) -> tuple[str, ...]:
            return (".motion_module.",)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)

    def attention(self, width: int, output: bool = False) -> list[nn.Module]:
        s = self.cfg
        heads = s.num_heads
        if s.num_head_channels != -1:
            heads = width // s.num_head_channels
        elif output and s.legacy and not s.is_told_tokens() and s.num_heads_upsample != -1:
            heads = s.num_heads_upsample
        if s.is_told_tokens():
            depth, dim = s.transformer_depth, s.context_dim or 0
            layer = SpatialTransformer(
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
        """z_t (B, C, T, H, W), t (B,) in [0, 1000) -> (B, out_channels, T, H, W).

        T is 1 without a motion module.
        Raises ValueError for what these settings cannot take, SizeError for sizes.
        """
        z = self.joined(z_t, cond)
        self.cfg.grid(Clip(*z.shape[1:]))
        if cond.image_context is not None or cond.scalars:
            names = [name for name, _ in cond.tensors() if name in ("image_context", *cond.scalars)]
            raise ValueError(f"backbone=unet2d takes no {', '.join(names)}")
        frames = z.shape[2]
        told = Told(self.embedding(z_t, t, cond), frames, cond.context, cond.context_mask)
        out = self.run(rearrange(z, "b c t h w -> (b t) c h w"), told)
        return rearrange(out, "(b t) c h w -> b c t h w", t=frames)
