"""Multimodal diffusion transformer of Stable Diffusion 3 for video (Esser et al. 2024, 2403.03206).

Text and video tokens are two streams with weights of their own, which attend jointly. Further
settings give the layers of later networks: 3-D RoPE, norms of queries and keys, SwiGLU, RMSNorm,
sandwich norms, register tokens, and the block of Wan 2.1 (2503.20314, section 4.2). Parameter names
are those of Stable Diffusion 3 in diffusers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import (
    by_frame,
    by_time,
    check_sizes,
    context_width,
    latent_size,
    refuse_image_context,
    vector_width,
    wired_number,
    with_concat,
)
from plugins._blocks.checkpointing import run_checkpointed
from plugins._blocks.cogvideox_transformer import NumberEmbedding
from plugins._blocks.grid_tables import even_rotary_table, square_table
from plugins._blocks.layers import MLP
from plugins._blocks.mmdit import PARTS, Block, Modulation, from_official, modulated
from plugins._configs.backbone import slots_taken
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    Conditions,
    ConfigError,
    Hidden,
    SizeError,
    Slots,
    State,
    above,
    in_range,
    must_divide,
    one_of,
)
from sandbox.registry import register

FROM_WIRING = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
CHOICES = {
    "text_attention": ("joint", "cross"),
    "modulation": ("block", "shared"),
    "norm": ("layer", "rms"),
    "qk_norm": ("none", "layer_norm", "rms_norm", "rms_norm_across_heads"),
    "mlp": ("gelu", "swiglu"),
}


@register("backbone", "mmdit")
class MMDiT(nn.Module):
    """Transformer with joint attention of a text and a video stream (SD3), or blocks of Wan."""

    @dataclass
    class Config(BackboneConfig):
        """Settings of Stable Diffusion 3 in diffusers under their names, and switches of layers.

        The width is num_attention_heads * attention_head_dim. patch_size: latent cells per token in
        space. pos_embed_max_size: rows and columns of a table of sinusoids that is added to the
        tokens of each frame, its middle for smaller frames; 0 without. sample_size: rows of latent
        cells that the table spans. rope: rotary positions of frame, row and column on video tokens.
        text_attention: "joint" (two streams, as in SD3) or "cross" (video tokens attend to
        themselves, then to text, as in Wan). modulation: "block" (adaLN-zero, a linear layer per
        block) or "shared" (adaLN-single: one for all blocks, and a table per block).
        norm: LayerNorm or RMSNorm before attention and MLP. qk_norm: of queries and keys, per head
        or over all heads. ffn_dim: hidden width of the MLPs; null: 4 widths, or with SwiGLU 8/3
        (rounded up to a multiple of 8). sandwich_norm: RMSNorm also after attention and MLP (Ding
        et al. 2021, 2105.13290, section 2.4). register_tokens: learned tokens in front of the text,
        or in its place (Darcet et al. 2023, 2309.16588). pooled_projection_dim: width of a vector
        condition, which is added to the embedding of time. time_scalars, time_scale: numbers of the
        method and the factor of all times, as in backbone=dit.
        """

        may_differ: ClassVar[tuple[str, ...]] = ("gradient_checkpointing",)

        num_attention_heads: int = 2
        attention_head_dim: int = 32
        num_layers: int = 4
        patch_size: int = 1
        sample_size: int = 4
        pos_embed_max_size: int = 0
        rope: bool = True
        text_attention: str = "joint"
        modulation: str = "block"
        norm: str = "layer"
        qk_norm: str = "rms_norm"
        mlp: str = "gelu"
        ffn_dim: int | None = None
        sandwich_norm: bool = False
        register_tokens: int = 4
        time_features: int = 256
        gradient_checkpointing: bool = False
        in_channels: int | None = None
        out_channels: int | None = None
        joint_attention_dim: int | None = None  # 0: no text tokens
        pooled_projection_dim: int | None = None  # 0: no vector
        time_scalars: tuple[str, ...] = ()
        time_scale: float | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size",
                         "sample_size", "ffn_dim", "in_channels", "out_channels"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            for name in ("pos_embed_max_size", "register_tokens", "joint_attention_dim",
                         "pooled_projection_dim"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 0)
            yield from in_range("time_features", self.time_features, 2)
            yield from above("time_scale", self.time_scale, 0, 1000)
            for name, choices in CHOICES.items():
                yield from one_of(name, getattr(self, name), choices)
            if not self.rope and not self.pos_embed_max_size:
                yield "rope=False: want pos_embed_max_size >= 1, or tokens have no position"
            if self.rope and (self.attention_head_dim < 6 or self.attention_head_dim % 2):
                yield (
                    f"attention_head_dim={self.attention_head_dim}: want an even number >= 6 with "
                    "rope=true (a pair of channels for each axis)"
                )
            if self.pos_embed_max_size and self.width() % 4:
                yield f"attention_head_dim={self.attention_head_dim}: want a width divisible by 4"
            if self.pos_embed_max_size and self.sample_size < self.patch_size:
                yield f"sample_size={self.sample_size}: want at least patch_size={self.patch_size}"
            if self.register_tokens and self.text_attention == "cross":
                yield (
                    f"register_tokens={self.register_tokens}: want 0 with text_attention=cross "
                    "(they are part of the second stream)"
                )

        def width(self) -> int:
            return self.num_attention_heads * self.attention_head_dim

        def mlp_width(self) -> int:
            """Hidden width of the MLPs."""
            if self.ffn_dim is not None:
                return self.ffn_dim
            return 4 * self.width() if self.mlp == "gelu" else -(-self.width() // 3) * 8

        def has_text(self) -> bool:
            """Whether there are tokens other than those of the video."""
            return bool(self.joint_attention_dim or self.register_tokens)

        def takes_frame_times(self) -> bool:
            return True

        def takes_time_scalars(self) -> bool:
            return True

        def blocks(self) -> tuple[str, ...]:
            return tuple(f"transformer_blocks.{i}" for i in range(self.num_layers))

        def hidden(self, block: str) -> Hidden | None:
            cells = 1, self.patch_size, self.patch_size
            return Hidden("b (t h w) d", self.width(), cells) if block in self.blocks() else None

        def layers(self) -> tuple[str | None, int]:
            return "num_layers", 1

        def takes(self) -> frozenset[str]:
            return slots_taken(
                context=self.joint_attention_dim != 0,
                vector=self.pooled_projection_dim != 0,
                concat=True,
            )

        def needs(self) -> frozenset[str]:
            return slots_taken(
                context=bool(self.joint_attention_dim), vector=bool(self.pooled_projection_dim)
            )

        def grid(self, z: Clip) -> Clip:
            for name in ("height", "width"):
                must_divide(name, getattr(z, name), self.patch_size)
                most = self.pos_embed_max_size * self.patch_size
                if most and getattr(z, name) > most:
                    rule = f"at most {most} (pos_embed_max_size={self.pos_embed_max_size} patches)"
                    raise SizeError(name, getattr(z, name), rule)
            if not self.rope and z.frames != 1:
                raise SizeError("frames", z.frames, "1 with rope=false, or rope=true")
            return z

        def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
            self.grid(z)
            names = tuple(sorted(slots.time_scalars))
            if self.time_scalars not in ((), names):
                stated, needed = list(self.time_scalars), list(names)
                raise ConfigError(f"time_scalars={stated}, but {needed} is needed")
            scale = 0.001 if names and self.time_scale is None else self.time_scale
            return replace(self, time_scalars=names, time_scale=scale).agree(
                in_channels=z.channels + slots.concat,
                out_channels=outputs * z.channels,
                joint_attention_dim=slots.context.width if slots.context else 0,
                pooled_projection_dim=slots.vector,
            )

        def adapter_targets(self) -> tuple[str, ...]:
            own = ("to_q", "to_k", "to_v", "to_out.0")
            if not self.has_text() or self.text_attention == "cross":
                return own
            last = ("to_add_out",) if self.num_layers > 1 else ()  # the last block has none
            return (*own, "add_q_proj", "add_k_proj", "add_v_proj", *last)

        def additions(self) -> tuple[str, ...]:
            return ("time_scalars.",)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        sizes = (wired_number(cfg, name) for name in FROM_WIRING)
        in_channels, out_channels, text_dim, vector_dim = sizes
        self.cfg = cfg
        width, patch, shared = cfg.width(), cfg.patch_size, cfg.modulation == "shared"
        self.pos_embed = PatchEmbed(cfg, in_channels)
        self.time_text_embed = nn.ModuleDict(
            {"timestep_embedder": NumberEmbedding(cfg.time_features, width)}
        )
        if vector_dim:
            self.time_text_embed["text_embedder"] = MLP(vector_dim, width, nn.SiLU())
        if shared:
            self.time_proj = nn.Linear(width, PARTS * width)
        if text_dim:
            self.context_embedder = nn.Linear(text_dim, width)
        if cfg.register_tokens:
            self.registers = nn.Parameter(torch.randn(cfg.register_tokens, width) * 0.02)
        self.transformer_blocks = nn.ModuleList(
            Block(cfg, cfg.has_text(), is_last=i == cfg.num_layers - 1)
            for i in range(cfg.num_layers)
        )
        self.norm_out = Modulation(width, 2, shared)
        self.proj_out = nn.Linear(width, patch**2 * out_channels)
        self.time_scalars = nn.ModuleDict(
            {name: NumberEmbedding(cfg.time_features, width) for name in cfg.time_scalars}
        )
        self.initialise()

    def from_published(self, state: State) -> State:
        """Translates weights of the official repository of SD3; returns others unchanged."""
        return from_official(state)

    def initialise(self) -> None:
        """Xavier for linear layers; zero for modulations, cross-attention and output layers."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        ends = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "time_proj", "proj_out",
                "cross.to_out.0")  # fmt: skip
        ends += tuple(f"time_scalars.{name}.linear_2" for name in self.time_scalars)
        for name, layer in self.named_modules():
            if name.endswith(ends):
                nn.init.zeros_(layer.get_parameter("weight"))

    def forward(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """z_t (B, C, T, H, W), t (B,) or (B, T) -> (B, out_channels, T, H, W).

        Raises ValueError for inputs that do not match the settings, SizeError for sizes.
        """
        cfg = self.cfg
        z = self.checked(z_t, cond)  # (B, in_channels, T, H, W)
        x = self.pos_embed(z)  # (B, T, H', W', D)
        frames, height, width = x.shape[1:4]
        text, x = self.text(cond, x), x.flatten(1, 3)
        mask = None
        if cond.context_mask is not None:  # of the keys: video, registers, text
            own = cfg.register_tokens + (x.shape[1] if cfg.text_attention == "joint" else 0)
            mask = F.pad(cond.context_mask, (own, 0), value=True)[:, None, None]
        rope = even_rotary_table(frames, (height, width), cfg.attention_head_dim, x.device)
        t = t if t.ndim == 2 else t[:, None]
        emb, last = self.embedding(t, cond)
        text_emb = emb if t.shape[1] == 1 else self.embedding(t.amax(1, keepdim=True), cond)[0]
        for block in self.transformer_blocks:
            text, x = run_checkpointed(
                cfg.gradient_checkpointing, block, text, x, emb, text_emb,
                rope if cfg.rope else None, mask,
            )  # fmt: skip
        shift, scale = self.norm_out(last)
        x = self.proj_out(modulated(x, shift, scale, cfg.norm))
        return rearrange(
            x, "b (t h w) (p q c) -> b c t (h p) (w q)",
            t=frames, h=height, p=cfg.patch_size, q=cfg.patch_size,
        )  # fmt: skip

    def checked(self, z_t: Tensor, cond: Conditions) -> Tensor:
        """Latents and concat channels (B, in_channels, T, H, W), after all checks."""
        z = with_concat(z_t, cond)
        self.cfg.grid(latent_size(z, self.cfg.in_channels))
        sizes = {"joint_attention_dim": context_width(cond)}
        check_sizes(self.cfg, {**sizes, "pooled_projection_dim": vector_width(cond)})
        refuse_image_context("mmdit", cond)
        if set(cond.scalars) != set(self.cfg.time_scalars):
            stated = f"backbone.time_scalars={list(self.cfg.time_scalars)}"
            raise ValueError(f"{stated}, but the inputs have {sorted(cond.scalars)}")
        return z

    def text(self, cond: Conditions, x: Tensor) -> Tensor | None:
        """Registers and text tokens, (B, L, D)."""
        parts = []
        if self.cfg.register_tokens:
            parts.append(self.registers.to(x.dtype).expand(x.shape[0], -1, -1))
        if cond.context is not None:
            parts.append(self.context_embedder(cond.context.to(self.context_embedder.weight.dtype)))
        return torch.cat(parts, 1) if parts else None

    def embedding(self, t: Tensor, cond: Conditions) -> tuple[Tensor, Tensor]:
        """Embeddings of t (B, F), numbers and vector: (B, F, K, D) of the blocks, (B, F, 1, D)."""
        embed, scale = self.time_text_embed, self.cfg.time_scale or 1.0
        emb = by_time(embed["timestep_embedder"], t * scale)  # (B, F, D)
        for name, number in self.time_scalars.items():
            emb = emb + by_frame(number(cond.scalars[name] * scale), emb)
        if cond.vector is not None:
            emb = emb + by_frame(embed["text_embedder"](cond.vector), emb)
        if self.cfg.modulation == "block":
            return emb[:, :, None], emb[:, :, None]
        return self.time_proj(F.silu(emb)).unflatten(-1, (PARTS, -1)), emb[:, :, None]


class PatchEmbed(nn.Module):
    """Projects patches to tokens and adds the table of positions: -> (B, T, H', W', D)."""

    pos_embed: Tensor

    def __init__(self, cfg: MMDiT.Config, in_channels: int) -> None:
        super().__init__()
        self.size = cfg.pos_embed_max_size
        self.proj = nn.Conv2d(in_channels, cfg.width(), cfg.patch_size, cfg.patch_size)
        if self.size:
            table = square_table(self.size, cfg.sample_size // cfg.patch_size, cfg.width())
            self.register_buffer("pos_embed", table[None].to(torch.get_default_dtype()))

    def forward(self, z: Tensor) -> Tensor:
        x = self.proj(rearrange(z, "b c t h w -> (b t) c h w"))
        x = rearrange(x, "(b t) d h w -> b t h w d", b=z.shape[0])
        if not self.size:
            return x
        height, width = x.shape[2:4]
        top, left = (self.size - height) // 2, (self.size - width) // 2
        table = self.pos_embed.to(x.dtype).view(self.size, self.size, -1)
        return x + table[top : top + height, left : left + width]
