"""Layers of the CogVideoX transformer (Yang et al. 2024, 2408.06072), released parameter names.

Text tokens are (B, L, D), video tokens (B, N, D).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.backbone import wired_number
from plugins._blocks.embeddings import sinusoids
from plugins._blocks.grid_tables import apply_rope, cached_sinusoidal_table, sinusoidal_table
from plugins._blocks.layers import GELU, MLP, FeedForward

QK_EPS = 1e-6  # of the norms of queries and keys, as published
Rope = tuple[Tensor, Tensor]  # cosines and sines of the video tokens, each (N, head_dim)


class Sizes(Protocol):
    """Settings of a released config.json that the layers read."""

    num_attention_heads: int
    attention_head_dim: int
    patch_size: int
    patch_size_t: int | None
    in_channels: int | None
    text_embed_dim: int | None
    max_text_seq_length: int | None
    time_embed_dim: int
    norm_eps: float
    use_rotary_positional_embeddings: bool
    use_learned_positional_embeddings: bool
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float

    def width(self) -> int: ...
    def sample_grid(self) -> tuple[int, int]: ...
    def sample_latents(self) -> int: ...


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class NumberEmbedding(MLP):
    """Embeds a number such as the diffusion time as `num_features` sinusoids: (B,) -> (B, D)."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__(num_features, width, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        features = sinusoids(x, self.linear_1.in_features)
        return super().forward(features.to(self.linear_1.weight.dtype))


class PatchEmbed(nn.Module):
    """Projects latents and text to tokens of one width, and adds absolute positions."""

    pos_embedding: Tensor

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        self.cfg = cfg
        width, patch = cfg.width(), cfg.patch_size
        channels, text_dim = wired_number(cfg, "in_channels"), wired_number(cfg, "text_embed_dim")
        if cfg.patch_size_t is None:
            self.proj: nn.Module = nn.Conv2d(channels, width, patch, patch)
        else:  # as published: with a bias, although the released patch_bias is false
            self.proj = nn.Linear(channels * cfg.patch_size_t * patch**2, width)
        if text_dim:
            self.text_proj = nn.Linear(text_dim, width)
        if cfg.use_learned_positional_embeddings:
            table = sinusoidal_table(cfg.sample_latents(), cfg.sample_grid(), width, self.scales())
            text = table.new_zeros(wired_number(cfg, "max_text_seq_length"), width)
            # As published: "learned" positions are a buffer, which training does not change.
            table = torch.cat((text, table.flatten(0, 1)))[None]
            self.register_buffer("pos_embedding", table.to(torch.get_default_dtype()))

    def scales(self) -> tuple[float, float]:
        return self.cfg.temporal_interpolation_scale, self.cfg.spatial_interpolation_scale

    def video(self, z: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, T', H', W', D)."""
        cfg = self.cfg
        if cfg.patch_size_t is None:
            x = self.proj(rearrange(z, "b c t h w -> (b t) c h w"))
            return rearrange(x, "(b t) d h w -> b t h w d", b=z.shape[0])
        return self.proj(
            rearrange(
                z, "b c (t r) (h p) (w q) -> b t h w (c r p q)",
                r=cfg.patch_size_t, p=cfg.patch_size, q=cfg.patch_size,
            )
        )  # fmt: skip

    def text(self, context: Tensor | None, x: Tensor) -> Tensor:
        """(B, L, text_embed_dim) -> (B, L, D); L is 0 where the network has no text."""
        cfg = self.cfg
        shape = (0, 0) if context is None else tuple(context.shape[1:])
        if shape != (cfg.max_text_seq_length, cfg.text_embed_dim):
            stated = f"max_text_seq_length={cfg.max_text_seq_length}"
            raise ValueError(
                f"backbone.{stated} and text_embed_dim={cfg.text_embed_dim}, but the inputs have "
                f"{shape[0]} tokens of width {shape[1]}"
            )
        if context is None or not cfg.text_embed_dim:
            return x.new_zeros(x.shape[0], 0, x.shape[-1])
        return self.text_proj(context.to(self.text_proj.weight.dtype))

    def with_positions(self, text: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L, D) and video (B, T', H', W', D) -> (B, L, D), (B, N, D)."""
        cfg, (frames, height, width) = self.cfg, x.shape[1:4]
        x = x.flatten(1, 3)
        if cfg.use_learned_positional_embeddings and frames == cfg.sample_latents():
            table = self.pos_embedding.to(x.dtype)
            return text + table[:, : text.shape[1]], x + table[:, text.shape[1] :]
        if cfg.use_rotary_positional_embeddings and not cfg.use_learned_positional_embeddings:
            return text, x
        # As published: clips of another length than the stored table's get computed sinusoids.
        table = cached_sinusoidal_table(
            frames, (height, width), x.shape[-1], self.scales(), x.dtype, x.device
        )
        return text, x + table.flatten(0, 1)


class Modulation(nn.Module):
    """A norm, and `number` shifts, scales and gates computed from the time embedding.

    Of six, the first three are for video tokens and the last three for text tokens.
    """

    def __init__(self, time_embed_dim: int, width: int, number: int, eps: float) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(time_embed_dim, number * width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, emb: Tensor, num_video: int) -> tuple[Tensor, ...]:
        """emb (B, E) -> each (B, 1, D); emb (B, 1 + T, E) of text and frames -> video (B, N, D)."""
        if emb.ndim == 2:
            return self.linear(emb)[:, None].chunk(self.number, -1)
        text, video = self.linear(emb).split((1, emb.shape[1] - 1), 1)
        video = video.repeat_interleave(num_video // video.shape[1], 1)
        return *video.chunk(self.number, -1)[:3], *text.chunk(self.number, -1)[3:]


class Attention(nn.Module):
    """Joint self-attention of text and video tokens; RoPE rotates video tokens only."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(head_dim, QK_EPS) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, text: Tensor, x: Tensor, rope: Rope | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length = text.shape[1]
        tokens = torch.cat((text, x), 1)  # (B, L + N, D)
        q, k, v = (
            to(tokens).unflatten(-1, (self.num_heads, -1))
            for to in (self.to_q, self.to_k, self.to_v)
        )  # (B, L + N, H, d)
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = (
                torch.cat((part[:, :length], apply_rope(part[:, length:], *rope)), 1)
                for part in (q, k)
            )
        q, k, v = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))  # (B, H, L + N, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.to_out[0](out.transpose(1, 2).flatten(2))
        return out[:, :length], out[:, length:]


class Block(nn.Module):
    """Attention and MLP over text and video tokens, with separate adaLN for each."""

    def __init__(self, cfg: Sizes) -> None:
        super().__init__()
        width, time = cfg.width(), cfg.time_embed_dim
        self.norm1 = Modulation(time, width, 6, cfg.norm_eps)
        self.attn1 = Attention(cfg.num_attention_heads, cfg.attention_head_dim)
        self.norm2 = Modulation(time, width, 6, cfg.norm_eps)
        self.ff = FeedForward(width, GELU)

    def forward(
        self, text: Tensor, x: Tensor, emb: Tensor, rope: Rope | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """text (B, L, D), x (B, N, D), emb (B, E) or (B, 1 + T, E), mask (B, 1, 1, L + N)."""
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(emb, x.shape[1])
        text_out, out = self.attn1(
            modulate(self.norm1.norm(text), text_shift, text_scale),
            modulate(self.norm1.norm(x), shift, scale), rope, mask,
        )  # fmt: skip
        text, x = torch.addcmul(text, text_gate, text_out), torch.addcmul(x, gate, out)

        shift, scale, gate, text_shift, text_scale, text_gate = self.norm2(emb, x.shape[1])
        tokens = (
            modulate(self.norm2.norm(text), text_shift, text_scale),
            modulate(self.norm2.norm(x), shift, scale),
        )
        text_out, out = self.ff(torch.cat(tokens, 1)).tensor_split([text.shape[1]], 1)
        return torch.addcmul(text, text_gate, text_out), torch.addcmul(x, gate, out)
