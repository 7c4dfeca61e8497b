"""Gradients of temporal attention in closed form: what the Triton kernels compute, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (B, T, S, H, D) and bias (H, T, T), given g (B, T, S, H*D).

    With P = softmax(scores), dP = g v^T and dS = P * (dP - rowsum(P * dP)):
    dv = P^T g, dq = scale * dS k, dk = scale * dS^T q, dbias = sum of dS over clips and positions.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    g, q, k, v = (x.to(exact) for x in (g.reshape(q.shape), q, k, v))
    scores = torch.einsum("bishd,bjshd->bshij", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(exact)
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
    p = scores.softmax(-1).nan_to_num(0.0) if bias is not None else scores.softmax(-1)
    dp = torch.einsum("bishd,bjshd->bshij", g, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = torch.einsum("bshij,bjshd->bishd", ds, k) * scale
    dk = torch.einsum("bshij,bishd->bjshd", ds, q) * scale
    dv = torch.einsum("bshij,bishd->bjshd", p, g)
    return dq, dk, dv, ds.sum((0, 1))
