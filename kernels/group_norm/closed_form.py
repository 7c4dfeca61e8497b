"""The statistics and gradients of group norm written out: what the kernels compute, in torch."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def rows(x: Tensor, per_frame: bool) -> Tensor:
    """(N, C, *spatial) -> (rows, C, places), a row being what one set of statistics may cover."""
    x = x.transpose(1, 2).flatten(0, 1) if per_frame else x
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


def statistics(
    x: Tensor, groups: int, eps: float, pre_shift: Tensor | None, frames: int, per_frame: bool
) -> tuple[Tensor, Tensor]:
    """mean and 1/sd, (statistics, groups)."""
    u = rows(x, per_frame).to(torch.promote_types(x.dtype, torch.float32))
    if pre_shift is not None:
        u = u + _rows_of(pre_shift, u)[:, :, None]
    sets = u.unflatten(1, (groups, -1)).unflatten(0, (-1, frames))  # (B, F, G, C/G, S)
    variance, mean = torch.var_mean(sets, (1, 3, 4), correction=0)
    return mean, torch.rsqrt(variance + eps)


def backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    silu: bool,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frames: int,
    per_frame: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, pre_shift, scale and shift, for g of the output.

    With xh = (x + pre_shift - mean) * rstd, z = gain * xh + offset and y = silu(z), the two sums
    A = sum dz and B = sum dz * xh over the places of a row and channel carry everything:
    dx = rstd * (gain * dz - c1 - xh * c2), c1 and c2 the means of gain * dz and gain * dz * xh over
    all that shares its statistics.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    u, dz = rows(x, per_frame).to(exact), rows(g, per_frame).to(exact)  # (R, C, S)
    r, c, _ = u.shape
    one, zero = u.new_ones(r, c), u.new_zeros(r, c)
    w, b = (d if p is None else p.to(exact).expand(r, c) for p, d in ((weight, one), (bias, zero)))
    add, by, to = (zero if p is None else _rows_of(p, u) for p in (pre_shift, scale, shift))

    def spread(statistic: Tensor) -> Tensor:  # (R/F, G) -> (R, C, 1)
        return statistic.repeat_interleave(frames, 0).repeat_interleave(c // groups, 1)[..., None]

    xh = (u + add[..., None] - spread(mean)) * spread(rstd)
    gain, offset = w * (1 + by), b * (1 + by) + to
    if silu:
        z = gain[..., None] * xh + offset[..., None]
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    sum_a, sum_b = dz.sum(2), (dz * xh).sum(2)  # (R, C)

    def centre(sums: Tensor) -> Tensor:
        sets = (gain * sums).unflatten(1, (groups, -1)).unflatten(0, (-1, frames))
        return spread(sets.sum((1, 3)) / (frames * c // groups * u.shape[2]))

    dx = spread(rstd) * (gain[..., None] * dz - centre(sum_a) - xh * centre(sum_b))
    shared = r // x.shape[0]  # rows for each row of parameters

    def gathered(d: Tensor) -> Tensor:  # (R, C) -> (N, C)
        return d.unflatten(0, (-1, shared)).sum(1)

    grads = (
        ((1 + by) * sum_b).sum(0),
        ((1 + by) * sum_a).sum(0),
        gathered(dx.sum(2)),
        gathered(w * sum_b + b * sum_a),
        gathered(sum_a),
    )
    if per_frame:  # (B*T, C, S) -> (B, C, T, ...)
        dx = dx.unflatten(0, (-1, shared)).transpose(1, 2)
    return dx.reshape(x.shape), *grads


def _rows_of(p: Tensor, u: Tensor) -> Tensor:
    """(N, C) -> (rows, C) in u's dtype."""
    return p.to(u.dtype).repeat_interleave(len(u) // len(p), 0)
