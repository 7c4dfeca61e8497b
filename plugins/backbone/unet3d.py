"""Video UNet of DynamiCrafter (Xing et al. 2023, 2310.12190), published parameter names.

The UNet of latent diffusion on the frames of a clip, with temporal attention and convolutions. It
is conditioned on text tokens, image tokens, image latents as channels, and a frame rate or stride.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import wired_number
from plugins._blocks.embeddings import timestep_embedding
from plugins._blocks.layers import zero_module
from plugins._blocks.unet import LayerInputs, Layers, TemporalConvBlock, UNet, as_rows_of
from plugins._blocks.unet_attention import SpatialTransformer, TemporalTransformer
from plugins._configs.backbone import (
    attention_widths,
    divisor_problems,
    has_levels,
    level_problems,
    middle_block,
    slots_taken,
)
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Hidden,
    Slots,
    Tokens,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

FS = ("fps", "frame_stride")  # scalar conditions that `fs` may be
INIT_HEADS = 8  # of init_attn, as published


@register("backbone", "unet3d")
class UNet3D(UNet):
    """Video UNet of DynamiCrafter: spatial and temporal transformers, text and image tokens."""

    @dataclass
    class Config(BackboneConfig):
        """The published hyper-parameters: small sizes, and the published default of the rest.

        attention_resolutions: downsampling factors (not sizes) with attention; the middle block
        always has it. num_head_channels: width of a head; -1 uses num_heads instead. use_linear:
        linear projections around transformers; false uses equivalent 1x1 convolutions.
        temporal_conv: four temporal convolutions after every ResBlock, which also cover space with
        tempspatial_aware; temporal_dropout is 0.1 as published, independent of dropout.
        addition_attention: one temporal transformer after the first convolution.
        use_relative_position: relative positions of frames, clamped to temporal_length. Without
        it, temporal_conv and use_causal_attention, the network ignores the order of frames.
        image_cross_attention: cross-attention to image tokens as well as text; ..._scale_learnable:
        with a learned weight per layer. fs_condition: conditions on fps or frame_stride, or on
        default_fs where the conditioning has neither.

        Any number of frames works: temporal_length (the clip length of the published training) only
        limits the distances that have separate positions.

        null: wiring fills it; 0: none. in_channels counts the latents and `concat`. Without a
        context, cross-attention becomes a second self-attention. adm_in_channels: width of a vector
        condition that is added to the time embedding, as named in Stability's models; DynamiCrafter
        has none.
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
            # As published, false has no effect: temporal attention is always self-attention.
            yield from one_of("temporal_selfatt_only", self.temporal_selfatt_only, [True])
            yield from level_problems(self)
            if self.addition_attention and self.num_head_channels < 1:
                yield "addition_attention=True: want num_head_channels > 0"
            if self.image_cross_attention and self.context_dim == 0:
                yield "image_cross_attention=True: want context_dim > 0, the width of all tokens"
            widths = attention_widths(self) if has_levels(self) else []
            name = "num_heads" if self.num_head_channels == -1 else "num_head_channels"
            yield from divisor_problems(name, getattr(self, name), widths)

        def takes(self) -> frozenset[str]:
            return slots_taken(
                context=self.context_dim != 0,
                image_context=self.context_dim != 0 and self.image_cross_attention is not False,
                vector=self.adm_in_channels != 0,
                concat=True,
                **dict.fromkeys(FS, self.fs_condition),
            )

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
            """Conditions that no setting of this backbone accepts."""
            for name, tokens in (("context", context), ("image_context", image)):
                if tokens and tokens.frames not in (1, z.frames):
                    # The published code accepts this and shows every frame the tokens of all.
                    yield (
                        f"unet3d: {name} has tokens for {tokens.frames} frames, but the latents "
                        f"have {z.frames}: want one set per frame, or one for all"
                    )
            if image and not context:
                yield "unet3d: image_context without context: want text tokens too"
            elif image and context and image.width != context.width:
                widths = f"{image.width} wide and context {context.width}"
                yield f"unet3d: image_context is {widths}: want equal widths"
            if self.fs_condition and set(FS) <= scalars:
                yield "fs_condition=True: want fps or frame_stride, but conditioning offers both"

        def takes_frame_times(self) -> bool:
            return True

        def blocks(self) -> tuple[str, ...]:
            return ("middle_block",)

        def hidden(self, block: str) -> Hidden | None:
            return middle_block(self) if block in self.blocks() else None

        def adapter_targets(self) -> tuple[str, ...]:
            image = ("to_k_ip", "to_v_ip") if self.image_cross_attention else ()
            return ("to_q", "to_k", "to_v", "to_out.0", *image)

    cfg: Config  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in the base

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        if cfg.fs_condition:
            self.fps_embedding = self.embedder(cfg.model_channels, 4 * cfg.model_channels)
            zero_module(self.fps_embedding[-1])
        if cfg.addition_attention:
            # As published: use_linear and use_causal_attention do not apply to this one.
            first = TemporalTransformer(
                cfg.model_channels, INIT_HEADS, cfg.num_head_channels, cfg.transformer_depth,
                max_distance=self.max_distance(), use_checkpoint=cfg.use_checkpoint,
            )  # fmt: skip
            self.init_attn = Layers(first)

    def max_distance(self) -> int:
        """Limit of the relative positions of frames; 0 for none."""
        return wired_number(self.cfg, "temporal_length") if self.cfg.use_relative_position else 0

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
        """z_t (B, C, T, H, W), t (B,) or (B, T) -> (B, out_channels, T, H, W).

        context is (B, L, D), or (B, T, L, D) for separate tokens per frame; image_context is
        (B, T or 1, L, D). Raises ValueError for inputs that do not match the settings, SizeError
        for sizes.
        """
        z = self.checked(z_t, cond)
        self.cfg.grid(Clip(*z.shape[1:]))
        frames = z.shape[2]
        context, mask = cond.context, cond.context_mask
        if context is not None and context.ndim == 4:
            context = self.token_sets("context", context, frames)  # (B or B*T, L, D)
            mask = None if mask is None else mask.repeat_interleave(len(context) // len(mask), 0)
        image = cond.image_context
        if (image is not None) != bool(self.cfg.image_cross_attention):
            stated = f"backbone.image_cross_attention={self.cfg.image_cross_attention}"
            found = "no" if image is None else "an"
            raise ValueError(f"{stated}, but the inputs have {found} image_context")
        if image is not None:
            image = self.token_sets("image_context", image, frames)
        emb = self.embedding(z_t, t, cond)
        if self.cfg.fs_condition or cond.scalars:
            emb = emb + as_rows_of(self.fs_embedding(z_t, cond), emb)
        inputs = LayerInputs(emb, frames, context, mask, image)
        x = self.run(rearrange(z, "b c t h w -> (b t) c h w"), inputs)
        return rearrange(x, "(b t) c h w -> b c t h w", t=frames)

    @staticmethod
    def token_sets(name: str, tokens: Tensor, frames: int) -> Tensor:
        """(B, 1, L, D) -> (B, L, D), shared by all frames; (B, T, L, D) -> (B*T, L, D)."""
        if tokens.shape[1] not in (1, frames):
            raise ValueError(
                f"backbone: {name} has tokens for {tokens.shape[1]} frames, but z_t has {frames}: "
                "want one set per frame, or one for all"
            )
        return tokens.flatten(0, 1)

    def fs_embedding(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Embedding of the frame rate or stride: (B, E)."""
        names = sorted(cond.scalars)
        if not set(names) <= set(FS if self.cfg.fs_condition else ()) or len(names) > 1:
            want = "fps or frame_stride" if self.cfg.fs_condition else "none"
            raise ValueError(f"backbone: the inputs have the scalars {names}: want {want}")
        default = torch.full((len(z_t),), float(self.cfg.default_fs), device=z_t.device)
        fs = cond.scalars[names[0]] if names else default
        return self.fps_embedding(timestep_embedding(fs, self.cfg.model_channels).to(z_t.dtype))
