"""Definition of `group_norm`, one formula at a time; slow and exact."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: str,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frames: int,
    per_frame: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Computes in float32 (float64 for float64 input) and rounds once at the end."""
    exact = torch.promote_types(x.dtype, torch.float32)
    n, c = x.shape[:2]
    u = x.to(exact).reshape(n, c, prod(x.shape[2:]))  # (N, C, S)
    if pre_shift is not None:
        u = u + pre_shift.to(exact)[:, :, None]
    if per_frame:  # (N, C, T*S) -> (N*T, C, S)
        u = u.unflatten(2, (x.shape[2], -1)).transpose(1, 2).flatten(0, 1)
    groups = u.unflatten(1, (num_groups, c // num_groups)).unflatten(0, (-1, frames))
    mean = groups.mean((1, 3, 4), keepdim=True)  # (B, 1, G, 1, 1) of (B, F, G, C/G, S)
    variance = (groups - mean).square().mean((1, 3, 4), keepdim=True)  # biased; second pass
    y = ((groups - mean) * torch.rsqrt(variance + eps)).flatten(0, 1).flatten(1, 2)
    if per_frame:
        y = y.unflatten(0, (n, x.shape[2])).transpose(1, 2).flatten(2)  # (N, C, S)
    if weight is not None:
        y = y * weight.to(exact)[:, None]
    if bias is not None:
        y = y + bias.to(exact)[:, None]
    if scale is not None:
        y = y * (1 + scale.to(exact)[:, :, None])
    if shift is not None:
        y = y + shift.to(exact)[:, :, None]
    if act == "silu":
        y = y * torch.sigmoid(y)
    return y.reshape(x.shape).to(out_dtype)
