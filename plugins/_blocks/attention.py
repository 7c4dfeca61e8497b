"""Attention layers over tokens, with LayerNorm on queries and keys.

The norms bound the scores at any learning rate (Dehghani et al. 2023, 2302.05442, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from plugins._blocks.frame_cache import PassCache
from plugins._blocks.grid_tables import apply_rope, rotary_frames


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, N, H, d), k and v (B, L, H, d), mask (B, L) True for keys to use -> (B, N, H*d)."""
    if mask is not None:
        mask = mask[:, None, None]  # (B, 1, 1, L)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def key_norm(head_dim: int) -> nn.LayerNorm:
    """Without a bias: softmax is invariant to a shift of the keys."""
    return nn.LayerNorm(head_dim, bias=False)


class SelfAttention(nn.Module):
    """Self-attention over all tokens: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width // num_heads), key_norm(width // num_heads)
        self.to_out = nn.Linear(width, width)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> three of (..., H, d), of one dtype: CUDA autocast runs norms in float32."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.norm_q(q).to(v), self.norm_k(k).to(v), v

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(attend(*self.qkv(x)))


class TemporalAttention(SelfAttention):
    """Self-attention over the frames at each position: (B, T, S, D) -> (B, T, S, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(kernels.temporal_attention(*self.qkv(x), heads=self.num_heads))


class CausalAttention(SelfAttention):
    """Attention at each position to its own and the `window - 1` frames before it.

    (B, T, S, D) -> (B, T, S, D). Rotary positions, so that the number of frames has no limit.
    `past` has the keys and values of the frames before these, under the number `layer`.
    """

    def __init__(self, width: int, num_heads: int, window: int, layer: int) -> None:
        super().__init__(width, num_heads)
        self.window, self.layer = window, layer

    def forward(self, x: Tensor, past: PassCache | None = None) -> Tensor:
        q, k, v = self.qkv(x)  # (B, T, S, H, d)
        frames, first = x.shape[1], past.frames if past else 0
        table = rotary_frames(first, frames, q.shape[-1], x.device)
        cos, sin = (part[:, None] for part in table)  # (T, 1, d): broadcasts over S
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if past is not None:
            k, v = past.extended(self.layer, k, v, self.window - 1)
        at = torch.arange(first, first + frames, device=x.device)
        distance = at[:, None] - torch.arange(
            first + frames - k.shape[1], first + frames, device=x.device
        )
        mask = (distance >= 0) & (distance < self.window)
        q, k, v = (part.permute(0, 2, 3, 1, 4) for part in (q, k, v))  # (B, S, H, T, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.permute(0, 3, 1, 2, 4).flatten(3))


class CrossAttention(nn.Module):
    """Tokens (B, N, D) attend to a context (B, L, context_dim) with mask (B, L): (B, N, D)."""

    def __init__(self, width: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(context_dim, 2 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width // num_heads), key_norm(width // num_heads)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1))  # (B, N, H, d)
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self.to_out(attend(self.norm_q(q).to(v), self.norm_k(k).to(v), v, mask))
