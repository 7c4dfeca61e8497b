"""Video UNet of DynamiCrafter (Xing et al. 2023, 2310.12190), published parameter names.

The UNet of latent diffusion on the frames of a clip, with attention and convolutions over time. It
is told a text, an image's tokens, the image's latents as channels, and a frame rate or stride.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.unet import Layers, TemporalConvBlock, Told, UNet, timestep_embedding, zeroed
from plugins._blocks.unet_attention import SpatialTransformer, TemporalTransformer
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Slots,
    Tokens,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

GROUPS = 32  # of every group norm, as published
RATES = ("fps", "frame_stride")  # the number that `fs` may be
INIT_HEADS = 8  # of init_attn, as published


@register("backbone", "unet3d")
class UNet3D(UNet):
    """Video UNet of DynamiCrafter: spatial and temporal transformers, text and image tokens."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters; what is not a size has the published default.

        attention_resolutions: downsampling factors (not sizes) at which there is attention; the
        middle always has it. num_head_channels: width of a head, which decides instead of
        num_heads; -1 for num_heads. use_linear: linear layers around transformers, not 1x1
        convolutions of the same function. temporal_conv: four convolutions over time after every
        ResBlock, over space too with tempspatial_aware, with temporal_dropout (published as 0.1
        whatever dropout is). addition_attention: one temporal transformer before all else.
        use_relative_position: temporal attention knows how far frames are apart, up to
        temporal_length; without it, temporal_conv and use_causal_attention frames have no order.
        image_cross_attention: an image's tokens beside the text; ..._scale_learnable: with a
        learned weight in each layer. fs_condition: is told fps or frame_stride, default_fs where
        the conditioning tells neither.

        Any number of frames works: temporal_length, which the published network was trained with,
        only says how many distances have positions of their own.

        null is what the latents and the conditioning need, 0 is none. in_channels counts concat
        channels too. Without context the cross-attention is a second self-attention.
        adm_in_channels: width of a vector that joins the time embedding, under the name of
        Stability's models; DynamiCrafter has none.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            "dropout",
            "temporal_dropout",
            "use_checkpoint",
            "default_fs",
        )

        in_channels: int | None = None
        out_channels: int | None = None
        model_channels: int = 64
        attention_resolutions: tuple[int, ...] = (2,)
        num_res_blocks: int = 1
        channel_mult: tuple[int, ...] = (1, 1)
        num_heads: int = 4
        num_head_channels: int = -1
        dropout: float = 0.0
        conv_resample: bool = True
        use_scale_shift_norm: bool = False
        resblock_updown: bool = False
        transformer_depth: int = 1
        context_dim: int | None = None
        use_linear: bool = False
        use_checkpoint: bool = False
        temporal_conv: bool = False
        tempspatial_aware: bool = False
        temporal_dropout: float = 0.1
        temporal_attention: bool = True
        temporal_selfatt_only: bool = True
        use_relative_position: bool = True
        use_causal_attention: bool = False
        temporal_length: int | None = None
        addition_attention: bool = False
        image_cross_attention: bool | None = None
        image_cross_attention_scale_learnable: bool = False
        fs_condition: bool = False
        default_fs: int = 4
        adm_in_channels: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("in_channels", "out_channels", "num_res_blocks", "transformer_depth",
                         "temporal_length"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("context_dim", "adm_in_channels", "default_fs"):
                yield from in_range(name, getattr(self, name), 0)
            for name in ("dropout", "temporal_dropout"):
                yield from in_range(name, getattr(self, name), 0, 0.99)
            # the published false is ignored there: temporal attention is always to the clip itself
            yield from one_of("temporal_selfatt_only", self.temporal_selfatt_only, [True])
            if self.model_channels < 1 or self.model_channels % GROUPS:
                yield f"model_channels={self.model_channels}: want a multiple of {GROUPS}"
            if self.addition_attention and self.num_head_channels < 1:
                yield "addition_attention=True: want num_head_channels > 0, which it reads"
            if self.image_cross_attention and self.context_dim == 0:
                yield "image_cross_attention=True: want context_dim > 0, also its tokens' width"
            if not self.channel_mult or min(self.channel_mult) < 1:
                yield f"channel_mult={list(self.channel_mult)}: want at least one level, each >= 1"
                return
            factors = [2**i for i in range(len(self.channel_mult))]
            if unknown := set(self.attention_resolutions) - set(factors):
                yield f"attention_resolutions={sorted(unknown)}: want some of {factors}, by factor"
            yield from self.head_problems(factors)

        def head_problems(self, factors: list[int]) -> Iterator[str]:
            mults = zip(factors, self.channel_mult, strict=True)
            at = [m for f, m in mults if f in self.attention_resolutions] + [self.channel_mult[-1]]
            widths = sorted({self.model_channels * m for m in at})
            name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
            n = getattr(self, name)
            if n < 1 or any(w % n for w in widths):
                yield f"{name}={n}: want a divisor of all widths with attention, {widths}"

        def takes(self) -> frozenset[str]:
            told = {
                "context": self.context_dim != 0,
                "image_context": self.context_dim != 0 and self.image_cross_attention is not False,
                "vector": self.adm_in_channels != 0,
                "concat": True,
                **dict.fromkeys(RATES, self.fs_condition),
            }
            return frozenset(name for name, is_told in told.items() if is_told)

        def grid(self, z: Clip) -> Clip:
            for name in ("height", "width"):
                must_divide(name, getattr(z, name), 2 ** (len(self.channel_mult) - 1))
            return z

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            takes = self.takes()
            context = slots.context if "context" in takes else None
            image = slots.image_context if "image_context" in takes else None
            if problems := list(self.token_problems(z, context, image, slots.scalars)):
                raise ConfigError(*problems)
            return self.agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                context_dim=context.width if context else 0,
                image_cross_attention=image is not None,
                adm_in_channels=slots.vector if "vector" in takes else 0,
                temporal_length=self.temporal_length or z.frames,
            )

        def token_problems(
            self, z: Clip, context: Tokens | None, image: Tokens | None, scalars: frozenset[str]
        ) -> Iterator[str]:
            """What no setting of the backbone can mend, in its own name."""
            for name, tokens in (("context", context), ("image_context", image)):
                if tokens and tokens.frames not in (1, z.frames):
                    # as published it would go on, and every frame would see the tokens of all
                    yield (
                        f"unet3d: {name} is for {tokens.frames} frames, and the latents have "
                        f"{z.frames}: want tokens for each of them, or one set for all"
                    )
            if image and not context:
                yield "unet3d: image_context without context: want text tokens beside it"
            elif image and context and image.width != context.width:
                widths = f"{image.width} wide and context {context.width}"
                yield f"unet3d: image_context is {widths}: want one width"
            if self.fs_condition and set(RATES) <= scalars:
                yield "fs_condition=True: takes fps or frame_stride, and it is offered both"

        def adapter_targets(self) -> tuple[str, ...]:
            image = ("to_k_ip", "to_v_ip") if self.image_cross_attention else ()
            return ("to_q", "to_k", "to_v", "to_out.0", *image)

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        if cfg.fs_condition:
            self.fps_embedding = self.embedder(cfg.model_channels, 4 * cfg.model_channels)
            zeroed(self.fps_embedding[-1])
        if cfg.addition_attention:
            # as published: neither use_linear nor use_causal_attention reaches this one
            first = TemporalTransformer(
                cfg.model_channels, INIT_HEADS, cfg.num_head_channels, cfg.transformer_depth,
                max_distance=self.max_distance(), use_checkpoint=cfg.use_checkpoint,
            )  # fmt: skip
            self.init_attn = Layers(first)

    def max_distance(self) -> int:
        """Frames up to which distances have positions of their own; 0 where they have none."""
        if not self.cfg.use_relative_position:
            return 0
        if self.cfg.temporal_length is None:
            raise ValueError("backbone.temporal_length is null: wiring fills it, or set a number")
        return self.cfg.temporal_length

    def attention(self, width: int, output: bool = False) -> list[nn.Module]:
        s = self.cfg
        head_dim = width // s.num_heads if s.num_head_channels == -1 else s.num_head_channels
        heads = width // head_dim
        layers: list[nn.Module] = [
            SpatialTransformer(
                width, heads, head_dim, s.transformer_depth, s.context_dim or 0, s.use_linear,
                bool(s.image_cross_attention), s.image_cross_attention_scale_learnable,
                s.use_checkpoint,
            )
        ]  # fmt: skip
        if s.temporal_attention:
            layers.append(
                TemporalTransformer(
                    width, heads, head_dim, s.transformer_depth, s.use_linear,
                    s.use_causal_attention, self.max_distance(), s.use_checkpoint,
                )
            )  # fmt: skip
        return layers

    def temporal_conv(self, width: int) -> TemporalConvBlock | None:
        s = self.cfg
        if not s.temporal_conv:
            return None
        return TemporalConvBlock(width, s.temporal_dropout, s.tempspatial_aware)

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) in [0, 1000) -> (B, out_channels, T, H, W).

        context is (B, L, D), or (B, T, L, D) for each frame; image_context (B, T or 1, L, D).
        Raises ValueError for what these settings cannot take, SizeError for sizes.
        """
        z = self.joined(z_t, cond)
        self.cfg.grid(Clip(*z.shape[1:]))
        frames = z.shape[2]
        context, mask = cond.context, cond.context_mask
        if context is not None and context.ndim == 4:
            context = self.sets("context", context, frames)  # (B or B*T, L, D)
            mask = None if mask is None else mask.repeat_interleave(len(context) // len(mask), 0)
        has_image = cond.image_context is not None
        if has_image != bool(self.cfg.image_cross_attention):
            stated = f"backbone.image_cross_attention={self.cfg.image_cross_attention}"
            found = "an" if has_image else "no"
            raise ValueError(f"{stated}, but conditions bring {found} image_context")
        image = self.sets("image_context", cond.image_context, frames) if has_image else None
        emb = self.embedding(z_t, t, cond) + self.rate(z_t, cond)
        told = Told(emb, frames, context, mask, image)
        x = self.run(rearrange(z, "b c t h w -> (b t) c h w"), told)
        return rearrange(x, "(b t) c h w -> b c t h w", t=frames)

    @staticmethod
    def sets(name: str, tokens: Tensor, frames: int) -> Tensor:
        """(B, 1, L, D) -> (B, L, D), serving all frames; (B, T, L, D) -> (B*T, L, D)."""
        if tokens.shape[1] not in (1, frames):
            raise ValueError(
                f"backbone: {name} is for {tokens.shape[1]} frames, and z_t has {frames}: want "
                "tokens for each of them, or one set for all"
            )
        return tokens.flatten(0, 1)

    def rate(self, z_t: Tensor, cond: Conditions) -> Tensor | float:
        """(B, E) of the frame rate or stride; 0 where this network is not told one."""
        told = sorted(cond.scalars)
        if not set(told) <= set(RATES if self.cfg.fs_condition else ()) or len(told) > 1:
            want = "fps or frame_stride" if self.cfg.fs_condition else "none"
            raise ValueError(f"backbone: conditions bring the numbers {told}: want {want}")
        if not self.cfg.fs_condition:
            return 0.0
        default = torch.full((len(z_t),), float(self.cfg.default_fs), device=z_t.device)
        fs = cond.scalars[told[0]] if told else default
        return self.fps_embedding(timestep_embedding(fs, self.cfg.model_channels).to(z_t.dtype))
