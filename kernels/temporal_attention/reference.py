"""Definition of `temporal_attention`, one formula at a time; slow and exact."""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    packed: Tensor | None = None,
) -> Tensor:
    """q, k, v (B, T, S, H, D) -> (B, T, S, H*D); `packed` is not used.

    Computes in float32 (float64 for float64 input) and rounds once at the end.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bishd,bjshd->bshij", q.to(exact), k.to(exact)) * scale
    if bias is not None:
        scores = scores + bias.to(exact)  # (H, T, T)
    if causal:
        future = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out = torch.einsum("bshij,bjshd->bishd", scores.softmax(-1), v.to(exact))
    return out.to(q.dtype).flatten(3).contiguous()
