"""Statistics and gradients of group norm in closed form: what the kernels compute, in PyTorch."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from kernels.group_norm.launches import Inputs, Options


def rows(x: Tensor, per_frame: bool) -> Tensor:
    """(N, C, *spatial) -> (rows, C, positions); statistics cover one or more rows."""
    x = x.transpose(1, 2).flatten(0, 1) if per_frame else x
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


def statistics(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """mean and 1/std, both (statistics, groups)."""
    x = inputs.x
    u = rows(x, options.per_frame).to(torch.promote_types(x.dtype, torch.float32))
    if inputs.pre_shift is not None:
        u = u + _rows_of(inputs.pre_shift, u)[:, :, None]
    # (B, F, G, C/G, S)
    sets = u.unflatten(1, (options.groups, -1)).unflatten(0, (-1, options.frames))
    variance, mean = torch.var_mean(sets, (1, 3, 4), correction=0)
    return mean, torch.rsqrt(variance + options.eps)


def backward(
    g: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of Inputs, given the gradient g of the output.

    With xh = (x + pre_shift - mean) * rstd, z = gain * xh + offset and y = silu(z), everything
    follows from the sums A = sum dz and B = sum dz * xh over the positions of a row and channel:
    dx = rstd * (gain * dz - c1 - xh * c2), where c1 and c2 are the means of gain * dz and
    gain * dz * xh over all elements that share statistics.
    """
    x, frames, per_frame = inputs.x, options.frames, options.per_frame
    exact = torch.promote_types(x.dtype, torch.float32)
    u, dz = rows(x, per_frame).to(exact), rows(g, per_frame).to(exact)  # (R, C, S)
    r, c, _ = u.shape
    w = u.new_ones(r, c) if inputs.weight is None else inputs.weight.to(exact).expand(r, c)
    b = u.new_zeros(r, c) if inputs.bias is None else inputs.bias.to(exact).expand(r, c)
    pre, scale, shift = (
        u.new_zeros(r, c) if p is None else _rows_of(p, u)
        for p in (inputs.pre_shift, inputs.scale, inputs.shift)
    )

    def spread(statistic: Tensor) -> Tensor:  # (R/F, G) -> (R, C, 1)
        per_row = statistic.repeat_interleave(frames, 0)
        return per_row.repeat_interleave(c // options.groups, 1)[..., None]

    xh = (u + pre[..., None] - spread(mean)) * spread(rstd)
    gain, offset = w * (1 + scale), b * (1 + scale) + shift
    if options.silu:
        z = gain[..., None] * xh + offset[..., None]
        s = torch.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    sum_a, sum_b = dz.sum(2), (dz * xh).sum(2)  # (R, C)

    def mean_of(sums: Tensor) -> Tensor:
        sets = (gain * sums).unflatten(1, (options.groups, -1)).unflatten(0, (-1, frames))
        return spread(sets.sum((1, 3)) / (frames * c // options.groups * u.shape[2]))

    dx = spread(rstd) * (gain[..., None] * dz - mean_of(sum_a) - xh * mean_of(sum_b))
    share = r // x.shape[0]  # rows of x per row of parameters

    def gathered(d: Tensor) -> Tensor:  # (R, C) -> (N, C)
        return d.unflatten(0, (-1, share)).sum(1)

    grads = (
        ((1 + scale) * sum_b).sum(0),
        ((1 + scale) * sum_a).sum(0),
        gathered(dx.sum(2)),
        gathered(w * sum_b + b * sum_a),
        gathered(sum_a),
    )
    if per_frame:  # (B*T, C, S) -> (B, C, T, ...)
        dx = dx.unflatten(0, (-1, share)).transpose(1, 2)
    return dx.reshape(x.shape), *grads


def _rows_of(p: Tensor, u: Tensor) -> Tensor:
    """(N, C) -> (rows, C) in u's dtype."""
    return p.to(u.dtype).repeat_interleave(len(u) // len(p), 0)
