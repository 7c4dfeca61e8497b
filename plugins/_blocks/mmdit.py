"""Layers of multimodal diffusion transformers (Esser et al. 2024, 2403.03206, section 4).

Text tokens are (B, L, D), video tokens (B, N, D), frame by frame. Time embeddings are (B, F, K, D),
F = 1 or the number of frames. Names of layers are those of Stable Diffusion 3 in diffusers.
"""

from __future__ import annotations

import re
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.grid_tables import apply_rope
from plugins._blocks.layers import GELU, FeedForward, SwiGLU
from sandbox.contracts import State

EPS = 1e-6  # of every norm, as published
PARTS = 6  # shift, scale and gate of attention, then of the MLP
OFFICIAL = (  # patterns of the official names, and our names
    (r"^pos_embed$", "pos_embed.pos_embed"),
    (r"^x_embedder\.", "pos_embed."),
    (r"^t_embedder\.mlp\.", "time_text_embed.timestep_embedder."),
    (r"^y_embedder\.mlp\.", "time_text_embed.text_embedder."),
    (r"(embedder)\.0\.", r"\1.linear_1."),
    (r"(embedder)\.2\.", r"\1.linear_2."),
    (r"^joint_blocks\.", "transformer_blocks."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"x_block\.adaLN_modulation\.1\.", "norm1.linear."),
    (r"context_block\.adaLN_modulation\.1\.", "norm1_context.linear."),
    (r"x_block\.attn\.proj\.", "attn.to_out.0."),
    (r"context_block\.attn\.proj\.", "attn.to_add_out."),
    (r"x_block\.attn\.ln_([qk])\.", r"attn.norm_\1."),
    (r"context_block\.attn\.ln_([qk])\.", r"attn.norm_added_\1."),
    (r"x_block\.mlp\.", "ff."),
    (r"context_block\.mlp\.", "ff_context."),
    (r"\.fc1\.", ".net.0.proj."),
    (r"\.fc2\.", ".net.2."),
)
QKV = {"x_block.attn.qkv.": "attn.to_{}.", "context_block.attn.qkv.": "attn.add_{}_proj."}
Rope = tuple[Tensor, Tensor]  # cosines and sines of the video tokens, each (N, head_dim)


class Sizes(Protocol):
    """Settings of the Config that the layers read."""

    num_attention_heads: int
    attention_head_dim: int
    text_attention: str
    modulation: str
    norm: str
    qk_norm: str
    mlp: str
    sandwich_norm: bool

    def width(self) -> int: ...
    def mlp_width(self) -> int: ...


def modulated(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
    """norm(x) * (1 + scale) + shift of x (B, N, D); shift and scale are (B, F, D)."""
    plain = F.layer_norm if norm == "layer" else F.rms_norm
    x = plain(x, x.shape[-1:], eps=EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def added(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """x + gate * out; x and out are (B, N, D), gate is (B, F, D)."""
    return x + (gate[:, :, None] * out.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


class Modulation(nn.Module):
    """`number` shifts, scales and gates, each (B, F, D), from time embeddings (B, F, K, D).

    From a linear layer of its own, K = 1 (Peebles & Xie 2023), or `shared`: the embeddings, K = 1
    or at least `number`, plus a table (adaLN-single, Chen et al. 2023, 2310.00426, section 2.3).
    """

    def __init__(self, width: int, number: int, shared: bool) -> None:
        super().__init__()
        self.number, self.shared = number, shared
        if shared:
            self.table = nn.Parameter(torch.zeros(1, number, width))
        else:
            self.linear = nn.Linear(width, number * width)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        if self.shared:
            parts = emb[:, :, : self.number] + self.table
        else:
            parts = self.linear(F.silu(emb[:, :, 0])).unflatten(-1, (self.number, -1))
            if self.number == 2:
                parts = parts.flip(2)  # as published: without a gate, the scale is first
        return parts.unbind(2)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its weights, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class HeadNorm(nn.Module):
    """Splits (B, N, D) into heads (B, N, H, d), normalised per head or over all heads."""

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        self.num_heads, self.across = cfg.num_attention_heads, "across" in cfg.qk_norm
        size = cfg.width() if self.across else cfg.attention_head_dim
        self.weight = nn.Parameter(torch.ones(size))
        if cfg.qk_norm == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # autocast leaves x in half precision
        if not self.across:
            x = x.unflatten(-1, (self.num_heads, -1))
        if hasattr(self, "bias"):
            x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)
        else:
            x = F.rms_norm(x, self.weight.shape, self.weight, EPS)
        return x.unflatten(-1, (self.num_heads, -1)) if self.across else x


def head_norm(cfg: Sizes) -> nn.Module:
    if cfg.qk_norm == "none":
        return nn.Unflatten(-1, (cfg.num_attention_heads, -1))
    return HeadNorm(cfg)


class JointAttention(nn.Module):
    """Self-attention over the tokens of both streams, each with projections of its own.

    RoPE rotates video tokens only. Without text the second stream has no layers, and in the last
    block no output layer.
    """

    def __init__(self, cfg: Sizes, has_text: bool, is_last: bool) -> None:
        super().__init__()
        width = cfg.width()
        self.num_heads = cfg.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = head_norm(cfg), head_norm(cfg)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if has_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                nn.Linear(width, width) for _ in range(3)
            )
            self.norm_added_q, self.norm_added_k = head_norm(cfg), head_norm(cfg)
        self.to_add_out = nn.Linear(width, width) if has_text and not is_last else None

    def forward(
        self, text: Tensor | None, x: Tensor, rope: Rope | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Outputs of text (None without an output layer) and of video."""
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x))  # (B, N, H, d)
        v = self.to_v(x).unflatten(-1, (self.num_heads, -1))
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if text is not None:
            q = torch.cat((q, self.norm_added_q(self.add_q_proj(text))), 1)  # (B, N + L, H, d)
            k = torch.cat((k, self.norm_added_k(self.add_k_proj(text))), 1)
            v = torch.cat((v, self.add_v_proj(text).unflatten(-1, (self.num_heads, -1))), 1)
        out = attend(q, k, v, mask)
        video, context = out.split((x.shape[1], out.shape[1] - x.shape[1]), 1)
        return None if self.to_add_out is None else self.to_add_out(context), self.to_out[0](video)


class CrossAttention(nn.Module):
    """Video tokens (B, N, D) attend to text tokens (B, L, D) with mask (B, 1, 1, L)."""

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        width = cfg.width()
        self.num_heads = cfg.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = head_norm(cfg), head_norm(cfg)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        v = self.to_v(text).unflatten(-1, (self.num_heads, -1))
        return self.to_out[0](
            attend(self.norm_q(self.to_q(x)), self.norm_k(self.to_k(text)), v, mask)
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, N, H, d), k and v (B, K, H, d), mask (B, 1, 1, K) -> (B, N, H * d)."""
    # CUDA autocast runs the norms of queries and keys in float32
    q, k, v = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and MLP of video and text tokens; text is a second stream or is attended to.

    The last block does not change text tokens.
    """

    def __init__(self, cfg: Sizes, has_text: bool, is_last: bool) -> None:
        super().__init__()
        width, shared = cfg.width(), cfg.modulation == "shared"
        self.norm = cfg.norm
        self.has_stream = has_text and cfg.text_attention == "joint"
        self.updates_text = self.has_stream and not is_last

        def mlp() -> FeedForward:
            return FeedForward(width, GELU if cfg.mlp == "gelu" else SwiGLU, cfg.mlp_width())

        def after() -> nn.Module:
            return RMSNorm(width, EPS) if cfg.sandwich_norm else nn.Identity()

        self.norm1 = Modulation(width, PARTS, shared)
        self.attn = JointAttention(cfg, self.has_stream, is_last)
        self.ff = mlp()
        self.after_attn, self.after_ff = after(), after()
        if has_text and not self.has_stream:
            self.norm_cross = nn.LayerNorm(width, EPS)
            self.cross = CrossAttention(cfg)
        if self.has_stream:
            self.norm1_context = Modulation(width, 2 if is_last else PARTS, shared)
        if self.updates_text:
            self.ff_context = mlp()
            self.after_attn_context, self.after_ff_context = after(), after()

    def forward(
        self, text: Tensor | None, x: Tensor, emb: Tensor, text_emb: Tensor, rope: Rope | None,
        mask: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """x (B, N, D), emb (B, F, K, D), text_emb (B, 1, K, D); `mask` is of the keys."""
        shift, scale, gate, *mlp = self.norm1(emb)
        h, context, text_mlp = modulated(x, shift, scale, self.norm), None, []
        if text is not None and self.has_stream:
            shift, scale, *text_mlp = self.norm1_context(text_emb)
            context = modulated(text, shift, scale, self.norm)
        context, h = self.attn(context, h, rope, mask if self.has_stream else None)
        x = added(x, gate, self.after_attn(h))
        if text is not None and not self.has_stream:
            x = x + self.cross(self.norm_cross(x), text, mask)
        shift, scale, gate = mlp
        x = added(x, gate, self.after_ff(self.ff(modulated(x, shift, scale, self.norm))))
        if text is None or context is None:
            return text, x
        attn_gate, shift, scale, gate = text_mlp
        text = added(text, attn_gate, self.after_attn_context(context))
        context = self.ff_context(modulated(text, shift, scale, self.norm))
        return added(text, gate, self.after_ff_context(context)), x


def from_official(state: State) -> State:
    """Weights of the official repository of SD3 under our names; returns others unchanged.

    Queries, keys and values are one layer there, and every modulation has the shift first.
    """
    if not any(name.startswith("joint_blocks.") for name in state):
        return state
    width, found = len(state["x_embedder.proj.bias"]), {}
    for name, weight in state.items():
        for pattern, new in OFFICIAL:
            name = re.sub(pattern, new, name)
        if ("norm1_context." in name or "norm_out." in name) and len(weight) == 2 * width:
            weight = torch.cat(weight.chunk(2)[::-1])
        for old, new in QKV.items():
            if old in name:
                parts = zip("qkv", weight.chunk(3), strict=True)
                found |= {name.replace(old, new.format(x)): rows for x, rows in parts}
                break
        else:
            found[name] = weight
    return found
