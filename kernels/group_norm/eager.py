"""`group_norm` in PyTorch operations, with the rounding of a model written in them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    """`F.group_norm` (float32 statistics for any dtype) and its fused neighbours in x's dtype.

    If the output or the weights have a wider dtype than x, computes in that dtype and rounds at the
    end: `F.group_norm` rejects mixed dtypes on some devices.
    """
    wide = torch.promote_types(x.dtype, out_dtype)
    for p in (weight, bias):
        wide = torch.promote_types(wide, p.dtype) if p is not None else wide
    x = x.to(wide)
    if pre_shift is not None:
        x = x + _per_channel(pre_shift, x)
    weight, bias = (p.to(wide) if p is not None else None for p in (weight, bias))
    if per_frame:  # (B, C, T, ...) -> (B*T, C, ...) and back
        y = F.group_norm(x.transpose(1, 2).flatten(0, 1), num_groups, weight, bias, eps)
        y = y.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)
    elif frames == 1:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:  # (B*F, C, ...) -> (B, C, F, ...) and back
        y = x.unflatten(0, (len(x) // frames, frames)).transpose(1, 2)
        y = F.group_norm(y, num_groups, weight, bias, eps).transpose(1, 2).flatten(0, 1)
    if scale is not None:
        y = y * (1 + _per_channel(scale, y))
    if shift is not None:
        y = y + _per_channel(shift, y)
    if act == "silu":
        y = F.silu(y)
    return y.to(out_dtype)


def _per_channel(p: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, ...), broadcastable to x and in its dtype."""
    return p.to(x.dtype).reshape(*p.shape, *(1,) * (x.ndim - 2))
