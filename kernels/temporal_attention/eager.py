"""`temporal_attention` with `F.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# CUDA attention kernels put the batch on a grid axis of at most 65,535 blocks; 16 clips of 64 x 64
# latents exceed it.
MAX_SEQUENCES = 65_535


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
    """q, k, v (B, T, S, H, D) -> (B, T, S, H*D); `packed` is not used."""
    batch, frames = q.shape[:2]
    if q.numel() == 0:
        return (q + k + v).flatten(3)  # empty, but connected to the autograd graph
    if bias is not None:
        bias = bias.to(q.dtype)
        if causal:  # SDPA takes either a mask or is_causal
            future = torch.ones(frames, frames, dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(future, float("-inf"))
    # (B, T, S, H, D) -> (B, S, H, T, D) -> (B*S, H, T, D)
    sequences = [x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v)]
    parts = [x.split(MAX_SEQUENCES) for x in sequences]
    outs = [
        F.scaled_dot_product_attention(
            *part, attn_mask=bias, is_causal=causal and bias is None, scale=scale
        )
        for part in zip(*parts, strict=True)
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(3).contiguous()
