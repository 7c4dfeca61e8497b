"""Group norm kernels, forward and backward. README.md has the derivation.

A *row* is one image, (channels, positions), addressed through strides; `frames` rows share
statistics. Channels first: a group that fits into registers is one program (`fwd`); larger groups
are measured in parts (`stats`) and written by a second launch (`apply`). Channels last (LAST):
parts are blocks of channels, independent of groups, and a small launch in between (`merge`)
combines them.

V is the number of elements per vector load, CPG the number of channels per group, S the number of
positions, and `share` the number of rows that share a row of parameters.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# Kernel bodies are Triton's language, not Python: constexpr arguments and tl.range have no types.

# no `from __future__ import annotations`: Triton reads the annotations

import triton
import triton.language as tl

# --- helpers --------------------------------------------------------------------------------------


@triton.jit
def _multiple(x, V: tl.constexpr):
    """x, in a form that tells the compiler that V divides it; a hint would be optimised away."""
    return x // V * V


@triton.jit
def _row_offset(r, inner, outer, step, V: tl.constexpr):
    """int64 offset of row r, a multiple of V."""
    return _multiple((r // inner).to(tl.int64) * outer + (r % inner).to(tl.int64) * step, V)


@triton.jit
def _affine(c, ok, r, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row):
    """gain and offset of channels c and parameter row r: z = gain * normalised + offset."""
    gain = tl.where(ok, 1.0, 0.0)
    offset = gain * 0.0
    if w_ptr is not None:
        gain = tl.load(w_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if b_ptr is not None:
        offset = tl.load(b_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        at = scale_ptr + r.to(tl.int64) * scale_row + c
        scale = 1.0 + tl.load(at, mask=ok, other=0.0).to(tl.float32)
        gain *= scale
        offset *= scale
    if shift_ptr is not None:
        at = shift_ptr + r.to(tl.int64) * shift_row + c
        offset += tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def _pre(c, ok, r, pre_ptr, pre_row):
    """pre_shift of channels c and parameter row r; zeros if there is none."""
    pre = tl.where(ok, 0.0, 0.0)
    if pre_ptr is not None:
        at = pre_ptr + r.to(tl.int64) * pre_row + c
        pre = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return pre


@triton.jit
def _pointers(ptr, c, s, channel, position, LAST: tl.constexpr):
    """(channels, positions) pointers, both relative to ptr."""
    if LAST:
        return ptr + (s.to(tl.int64) * position)[None, :] + c[:, None]
    else:
        return ptr + (c.to(tl.int64) * channel)[:, None] + s[None, :]


@triton.jit
def _merge_moments(n, mean, m2, k, mean_k, m2_k):
    """Count, mean and sum of squared deviations of two sets (Chan et al. 1983, eq. 2.1)."""
    total = n + k
    delta = mean_k - mean
    mean += delta * (k / total)
    m2 += m2_k + delta * delta * (n * (k / total))
    return total, mean, m2


@triton.jit
def _dz(xh, dy, gain, offset, SILU: tl.constexpr):
    """Gradient before the activation. Cannot overflow: a saturated sigmoid is exactly 0 or 1."""
    if SILU:
        z = xh * gain + offset
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


@triton.jit
def _aligned(first, last, V: tl.constexpr, LAST: tl.constexpr):
    """(first, last), of which `last` with LAST, else `first`, is marked as a multiple of V."""
    if LAST:
        last = _multiple(last, V)
    else:
        first = _multiple(first, V)
    return first, last


@triton.jit
def _part(pid, C, G, splits, CPG: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """(row, split, group or block of channels, its first channel, its end) of a program."""
    per_row = tl.cdiv(C, CHANNELS) if LAST else G
    which = pid % per_row
    begin = which * (CHANNELS if LAST else CPG)
    end = tl.minimum(begin + CHANNELS, C) if LAST else begin + CPG
    return pid // per_row // splits, (pid // per_row) % splits, which, begin, end


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def group_norm_fwd_kernel(
    x_ptr, y_ptr,  # rows of (C, S), contiguous positions
    mean_ptr, rstd_ptr,  # (statistics, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    eps, C, G, share, pre_row, scale_row, shift_row,
    inner, x_outer, x_step, x_channel, y_outer, y_step, y_channel,
    FRAMES: tl.constexpr, CPG: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program normalises one group in registers, in runs of V positions of one channel."""
    pid = tl.program_id(0)
    group = pid % G
    e = tl.arange(0, BLOCK // V) * V
    ok = e < FRAMES * CPG * S
    c = group * CPG + (e // S) % CPG
    s = e % S
    r = (pid // G) * FRAMES + e // (CPG * S)
    if FRAMES == 1:
        r = pid // G
    x_at = _row_offset(r, inner, x_outer, x_step, V) + c.to(tl.int64) * x_channel + s
    y_at = _row_offset(r, inner, y_outer, y_step, V) + c.to(tl.int64) * y_channel + s
    run = tl.arange(0, V)[None, :]
    x = tl.load(x_ptr + tl.multiple_of(x_at, [V])[:, None] + run, mask=ok[:, None], other=0.0)
    u = x.to(tl.float32) + _pre(c, ok, r // share, pre_ptr, pre_row)[:, None]

    count = FRAMES * CPG * S
    mean = tl.sum(tl.where(ok[:, None], u, 0.0)) / count
    u = tl.where(ok[:, None], u - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(u * u) / count + eps)
    gain, offset = _affine(
        c, ok, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
    )
    z = u * (rstd * gain)[:, None] + offset[:, None]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y_ptr + tl.multiple_of(y_at, [V])[:, None] + run, z, mask=ok[:, None])
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


@triton.jit
def group_norm_stats_kernel(
    x_ptr,  # rows of (C, S), contiguous positions
    pre_ptr,  # (parameter rows, C) or None
    mean_ptr, m2_ptr,  # (statistics, G, FRAMES * splits) float32
    G, S, share, pre_row, inner, x_outer, x_step, x_channel, frames, splits, blocks,
    CPG: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One program measures one of `splits` parts of a group of a row, `blocks` steps long."""
    pid = tl.program_id(0)
    split = pid % splits
    group = (pid // splits) % G
    r = pid // splits // G
    start = _row_offset(r, inner, x_outer, x_step, V)
    size = CPG * S
    n = 0.0
    mean = 0.0
    m2 = 0.0
    first = split * blocks
    for block in tl.range(first, tl.minimum(first + blocks, tl.cdiv(size, BLOCK))):
        e = block * BLOCK + tl.arange(0, BLOCK // V) * V
        ok = e < size
        c = group * CPG + e // S
        x_at = tl.multiple_of(start + c.to(tl.int64) * x_channel + e % S, [V])
        x = tl.load(x_ptr + x_at[:, None] + tl.arange(0, V)[None, :], mask=ok[:, None], other=0.0)
        u = x.to(tl.float32) + _pre(c, ok, r // share, pre_ptr, pre_row)[:, None]
        k = tl.minimum(BLOCK, size - block * BLOCK).to(tl.float32)
        mean_k = tl.sum(tl.where(ok[:, None], u, 0.0)) / k
        u = tl.where(ok[:, None], u - mean_k, 0.0)
        n, mean, m2 = _merge_moments(n, mean, m2, k, mean_k, tl.sum(u * u))
    at = ((r // frames) * G + group) * (frames * splits) + (r % frames) * splits + split
    tl.store(mean_ptr + at, mean)
    tl.store(m2_ptr + at, m2)


@triton.jit
def group_norm_last_stats_kernel(
    x_ptr,  # rows of (S, C), contiguous channels
    pre_ptr,  # (parameter rows, C) or None
    mean_ptr, m2_ptr,  # (rows, splits, C) float32
    C, S, share, pre_row, inner, x_outer, x_step, x_position, splits, blocks,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One program measures each channel of a block in one of `splits` parts of a row."""
    pid = tl.program_id(0)
    C = _multiple(C, V)
    x_position = _multiple(x_position, V)
    chunks = tl.cdiv(C, CHANNELS)
    split = (pid // chunks) % splits
    r = pid // chunks // splits
    c = (pid % chunks) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += _row_offset(r, inner, x_outer, x_step, V)
    pre = _pre(c, c < C, r // share, pre_ptr, pre_row)
    n = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    first = split * blocks
    for block in tl.range(first, tl.minimum(first + blocks, tl.cdiv(S, POSITIONS))):
        s = block * POSITIONS + tl.arange(0, POSITIONS)
        ok = (c < C)[:, None] & (s < S)[None, :]
        u = tl.load(_pointers(x_ptr, c, s, 1, x_position, True), mask=ok, other=0.0).to(tl.float32)
        u += pre[:, None]
        k = tl.minimum(POSITIONS, S - block * POSITIONS).to(tl.float32)
        mean_k = tl.sum(tl.where(ok, u, 0.0), 1) / k
        u = tl.where(ok, u - mean_k[:, None], 0.0)
        n, mean, m2 = _merge_moments(n, mean, m2, k, mean_k, tl.sum(u * u, 1))
    at = (r * splits + split).to(tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=c < C)
    tl.store(m2_ptr + at, m2, mask=c < C)


@triton.jit
def group_norm_merge_kernel(
    part_mean_ptr, part_m2_ptr,  # (rows, splits, C) float32
    mean_ptr, rstd_ptr,  # (statistics, G) float32
    eps, C, G, S, frames, splits, length,
    CPG: tl.constexpr, CPG_POWER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program merges the parts of the channels of one group, ROWS at a time."""
    pid = tl.program_id(0)
    j = tl.arange(0, CPG_POWER)
    c = (pid % G) * CPG + j
    pieces = frames * splits
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for p0 in tl.range(0, pieces, ROWS):
        p = p0 + tl.arange(0, ROWS)
        split = p % splits
        size = tl.where(p < pieces, tl.minimum(length, S - split * length), 0).to(tl.float32)
        ok = (p < pieces)[:, None] & (j < CPG)[None, :]
        at = ((pid // G) * pieces + p).to(tl.int64)[:, None] * C + c[None, :]
        means = tl.load(part_mean_ptr + at, mask=ok, other=0.0)
        k = tl.sum(size) * CPG
        mean_k = tl.sum(means * size[:, None]) / k
        delta = means - mean_k
        m2_k = tl.load(part_m2_ptr + at, mask=ok, other=0.0) + size[:, None] * delta * delta
        n, mean, m2 = _merge_moments(n, mean, m2, k, mean_k, tl.sum(tl.where(ok, m2_k, 0.0)))
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, tl.rsqrt(m2 / n + eps))


@triton.jit
def _merged_parts(
    mean_ptr, m2_ptr, at, parts, pieces, length, size, eps, PIECES: tl.constexpr
):  # fmt: skip
    """mean and 1/std of statistics set `at`: `pieces` parts of `length` of each frame's `size`."""
    p = tl.arange(0, PIECES)
    ok = p < parts
    count = tl.minimum(length, size - (p % pieces) * length)
    count = tl.where(ok, count, 0).to(tl.float32)
    total = tl.sum(count)
    means = tl.load(mean_ptr + at * parts + p, mask=ok, other=0.0)
    mean = tl.sum(means * count) / total
    delta = tl.where(ok, means - mean, 0.0)
    m2 = tl.load(m2_ptr + at * parts + p, mask=ok, other=0.0) + count * delta * delta
    return mean, tl.rsqrt(tl.sum(m2) / total + eps)


@triton.jit
def group_norm_apply_kernel(
    x_ptr, y_ptr,  # rows of (C, S) or, with LAST, (S, C)
    part_mean_ptr, part_m2_ptr,  # (statistics, G, frames * pieces) float32; None with LAST
    mean_ptr, rstd_ptr,  # (statistics, G) float32: written here, or read with LAST
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    eps, C, G, S, share, pre_row, scale_row, shift_row,
    inner, x_outer, x_step, x_channel, x_position, y_outer, y_step, y_channel, y_position,
    frames, pieces, length, splits, blocks,
    CPG: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program writes one of `splits` parts of a group (LAST: block of channels) of a row.

    It starts at the end: the data that the previous launch read last is still in the L2 cache.
    """
    S, C = _aligned(S, C, V, LAST)
    x_channel, x_position = _aligned(x_channel, x_position, V, LAST)
    y_channel, y_position = _aligned(y_channel, y_position, V, LAST)
    r, split, which, begin, end = _part(tl.program_id(0), C, G, splits, CPG, CHANNELS, LAST)
    x_ptr += _row_offset(r, inner, x_outer, x_step, V)
    y_ptr += _row_offset(r, inner, y_outer, y_step, V)

    if not LAST:
        at = (r // frames) * G + which
        mean, rstd = _merged_parts(
            part_mean_ptr, part_m2_ptr, at, frames * pieces, pieces, length, CPG * S, eps, PIECES
        )
        if (split == 0) & (r % frames == 0):
            tl.store(mean_ptr + at, mean)
            tl.store(rstd_ptr + at, rstd)

    last = tl.minimum((split + 1) * blocks, tl.cdiv(S, POSITIONS)) - 1
    for c0 in tl.range(begin, end, CHANNELS):
        j = tl.arange(0, CHANNELS)
        c = c0 + j
        live = c < end
        gain, offset = _affine(
            c, live, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
        )
        if LAST:
            at = (r // frames) * G + c // CPG
            mean = tl.load(mean_ptr + at, mask=live, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + at, mask=live, other=0.0)[:, None]
        pre = _pre(c, live, r // share, pre_ptr, pre_row)[:, None]
        factor = rstd * gain[:, None]
        x_c = x_ptr + tl.cast(c0, tl.int64) * x_channel
        y_c = y_ptr + tl.cast(c0, tl.int64) * y_channel
        for back in tl.range(last - split * blocks + 1):
            s = (last - back) * POSITIONS + tl.arange(0, POSITIONS)
            ok = live[:, None] & (s < S)[None, :]
            x = tl.load(_pointers(x_c, j, s, x_channel, x_position, LAST), mask=ok, other=0.0)
            z = (x.to(tl.float32) + pre - mean) * factor + offset[:, None]
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(_pointers(y_c, j, s, y_channel, y_position, LAST), z, mask=ok)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _normalised(
    x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
    x_channel, x_position, g_channel, g_position, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(normalised x, gradient before the activation), both (channels, positions)."""
    x = tl.load(_pointers(x_ptr, j, s, x_channel, x_position, LAST), mask=ok, other=0.0)
    g = tl.load(_pointers(g_ptr, j, s, g_channel, g_position, LAST), mask=ok, other=0.0)
    xh = (x.to(tl.float32) + pre[:, None] - mean[:, None]) * rstd[:, None]
    return xh, _dz(xh, g.to(tl.float32), gain[:, None], offset[:, None], SILU)


@triton.jit
def _sums(
    x_ptr, g_ptr, j, live, mean, rstd, pre, gain, offset, first, stop, S,
    x_channel, x_position, g_channel, g_position,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    SUM_XH: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz * xh and, with SUM_XH, xh of each channel over blocks of positions."""
    a = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    b = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    h = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    for block in tl.range(first, stop):
        s = block * POSITIONS + tl.arange(0, POSITIONS)
        ok = live[:, None] & (s < S)[None, :]
        xh, dz = _normalised(
            x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
            x_channel, x_position, g_channel, g_position, SILU, LAST,
        )  # fmt: skip
        a += dz
        b += dz * xh
        if SUM_XH:
            h += tl.where(ok, xh, 0.0)
    return tl.sum(a, 1), tl.sum(b, 1), tl.sum(h, 1)


@triton.jit
def _store_sums(a_ptr, bq_ptr, h_ptr, at, a, bq, h, live):
    """Stores the sums of `_sums` whose pointer is not None."""
    if a_ptr is not None:
        tl.store(a_ptr + at, a, mask=live)
        tl.store(bq_ptr + at, bq, mask=live)
    if h_ptr is not None:
        tl.store(h_ptr + at, h, mask=live)


@triton.jit
def _write_dx(
    x_ptr, g_ptr, dx_ptr, j, live, mean, rstd, pre, gain, offset, c1, c2, first, stop, S,
    x_channel, x_position, g_channel, g_position, d_channel, d_position,
    POSITIONS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * dz - c1 - xh * c2), from the last block to the first (see `apply`)."""
    for back in tl.range(stop - first):
        s = (stop - 1 - back) * POSITIONS + tl.arange(0, POSITIONS)
        ok = live[:, None] & (s < S)[None, :]
        xh, dz = _normalised(
            x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
            x_channel, x_position, g_channel, g_position, SILU, LAST,
        )  # fmt: skip
        dx = rstd[:, None] * (gain[:, None] * dz - c1[:, None] - xh * c2[:, None])
        tl.store(_pointers(dx_ptr, j, s, d_channel, d_position, LAST), dx, mask=ok)


@triton.jit
def group_norm_bwd_kernel(
    x_ptr, g_ptr, dx_ptr,  # rows of (C, S), contiguous positions; g is the output's gradient
    mean_ptr, rstd_ptr,  # (rows, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    a_ptr, bq_ptr, h_ptr,  # (rows, C) float32 sums, or None
    c1_ptr, c2_ptr,  # (rows, G) float32, or None
    inverse, C, G, S, share, pre_row, scale_row, shift_row, inner,
    x_outer, x_step, x_channel, g_outer, g_step, g_channel, d_outer, d_step, d_channel,
    CPG: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, V: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One program computes the sums of one group of a row, then reads it again to write dx."""
    pid = tl.program_id(0)
    S = _multiple(S, V)
    x_channel = _multiple(x_channel, V)
    g_channel = _multiple(g_channel, V)
    d_channel = _multiple(d_channel, V)
    group = pid % G
    r = pid // G
    x_ptr += _row_offset(r, inner, x_outer, x_step, V)
    g_ptr += _row_offset(r, inner, g_outer, g_step, V)
    dx_ptr += _row_offset(r, inner, d_outer, d_step, V)
    j = tl.arange(0, CHANNELS)
    ones = tl.full((CHANNELS,), 1.0, tl.float32)
    mean = tl.load(mean_ptr + pid) * ones
    rstd = tl.load(rstd_ptr + pid) * ones
    begin = group * CPG
    end = begin + CPG
    blocks = tl.cdiv(S, POSITIONS)
    c1 = 0.0
    c2 = 0.0
    for c0 in tl.range(begin, end, CHANNELS):
        c = c0 + j
        live = c < end
        gain, offset = _affine(
            c, live, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
        )
        pre = _pre(c, live, r // share, pre_ptr, pre_row)
        c0_ = tl.cast(c0, tl.int64)
        a, bq, h = _sums(
            x_ptr + c0_ * x_channel, g_ptr + c0_ * g_channel, j, live, mean, rstd, pre, gain,
            offset, 0, blocks, S, x_channel, 1, g_channel, 1,
            CHANNELS, POSITIONS, SILU, False, h_ptr is not None,
        )  # fmt: skip
        c1 += tl.sum(gain * a)
        c2 += tl.sum(gain * bq)
        at = r.to(tl.int64) * C + c
        _store_sums(a_ptr, bq_ptr, h_ptr, at, a, bq, h, live)
    c1 *= inverse
    c2 *= inverse
    if c1_ptr is not None:
        tl.store(c1_ptr + pid, c1)
        tl.store(c2_ptr + pid, c2)
    for c0 in tl.range(begin, end, CHANNELS):
        c = c0 + j
        live = c < end
        gain, offset = _affine(
            c, live, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
        )
        pre = _pre(c, live, r // share, pre_ptr, pre_row)
        c0_ = tl.cast(c0, tl.int64)
        _write_dx(
            x_ptr + c0_ * x_channel, g_ptr + c0_ * g_channel, dx_ptr + c0_ * d_channel, j, live,
            mean, rstd, pre, gain, offset, c1 * ones, c2 * ones, 0, blocks, S,
            x_channel, 1, g_channel, 1, d_channel, 1, POSITIONS, SILU, False,
        )  # fmt: skip


@triton.jit
def group_norm_bwd_sums_kernel(
    x_ptr, g_ptr,  # rows of (C, S) or, with LAST, (S, C); g is the output's gradient
    mean_ptr, rstd_ptr,  # (statistics, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    a_ptr, bq_ptr, h_ptr,  # (rows, splits, C) float32 sums, or None
    part1_ptr, part2_ptr,  # (statistics, G, frames * splits) float32; None with LAST
    C, G, S, share, pre_row, scale_row, shift_row, inner,
    x_outer, x_step, x_channel, x_position, g_outer, g_step, g_channel, g_position,
    frames, splits, blocks,
    CPG: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, V: tl.constexpr,
    SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program sums one of `splits` parts of a group (LAST: block of channels) of a row."""
    S, C = _aligned(S, C, V, LAST)
    x_channel, x_position = _aligned(x_channel, x_position, V, LAST)
    g_channel, g_position = _aligned(g_channel, g_position, V, LAST)
    r, split, which, begin, end = _part(tl.program_id(0), C, G, splits, CPG, CHANNELS, LAST)
    x_ptr += _row_offset(r, inner, x_outer, x_step, V)
    g_ptr += _row_offset(r, inner, g_outer, g_step, V)
    first = split * blocks
    stop = tl.minimum(first + blocks, tl.cdiv(S, POSITIONS))
    j = tl.arange(0, CHANNELS)
    c1 = 0.0
    c2 = 0.0
    for c0 in tl.range(begin, end, CHANNELS):
        c = c0 + j
        live = c < end
        gain, offset = _affine(
            c, live, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
        )
        pre = _pre(c, live, r // share, pre_ptr, pre_row)
        at = (r // frames) * G + c // CPG
        mean = tl.load(mean_ptr + at, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=live, other=0.0)
        c0_ = tl.cast(c0, tl.int64)
        a, bq, h = _sums(
            x_ptr + c0_ * x_channel, g_ptr + c0_ * g_channel, j, live, mean, rstd, pre, gain,
            offset, first, stop, S, x_channel, x_position, g_channel, g_position,
            CHANNELS, POSITIONS, SILU, LAST, h_ptr is not None,
        )  # fmt: skip
        c1 += tl.sum(gain * a)
        c2 += tl.sum(gain * bq)
        to = (r * splits + split).to(tl.int64) * C + c
        _store_sums(a_ptr, bq_ptr, h_ptr, to, a, bq, h, live)
    if part1_ptr is not None:
        to = ((r // frames) * G + which) * (frames * splits) + (r % frames) * splits + split
        tl.store(part1_ptr + to, c1)
        tl.store(part2_ptr + to, c2)


@triton.jit
def group_norm_bwd_merge_kernel(
    a_ptr, bq_ptr,  # (rows, splits, C) float32
    w_ptr,  # (C,) or None
    scale_ptr,  # (parameter rows, C) or None
    c1_ptr, c2_ptr,  # (statistics, G) float32
    inverse, C, G, share, scale_row, frames, splits,
    CPG: tl.constexpr, CPG_POWER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program adds up the sums of the channels of one group, ROWS parts at a time."""
    pid = tl.program_id(0)
    j = tl.arange(0, CPG_POWER)
    c = (pid % G) * CPG + j
    pieces = frames * splits
    c1 = 0.0
    c2 = 0.0
    for p0 in tl.range(0, pieces, ROWS):
        p = p0 + tl.arange(0, ROWS)
        ok = (p < pieces)[:, None] & (j < CPG)[None, :]
        at = ((pid // G) * pieces + p).to(tl.int64)[:, None] * C + c[None, :]
        gain = tl.where(ok, 1.0, 0.0)
        if w_ptr is not None:
            gain *= tl.load(w_ptr + c, mask=j < CPG, other=0.0).to(tl.float32)[None, :]
        if scale_ptr is not None:
            n = ((pid // G) * frames + p // splits) // share
            scale_at = scale_ptr + n.to(tl.int64)[:, None] * scale_row + c[None, :]
            gain *= 1.0 + tl.load(scale_at, mask=ok, other=0.0).to(tl.float32)
        c1 += tl.sum(gain * tl.load(a_ptr + at, mask=ok, other=0.0))
        c2 += tl.sum(gain * tl.load(bq_ptr + at, mask=ok, other=0.0))
    tl.store(c1_ptr + pid, c1 * inverse)
    tl.store(c2_ptr + pid, c2 * inverse)


@triton.jit
def group_norm_bwd_dx_kernel(
    x_ptr, g_ptr, dx_ptr,  # rows of (C, S) or, with LAST, (S, C); g is the output's gradient
    mean_ptr, rstd_ptr,  # (statistics, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    part1_ptr, part2_ptr,  # (statistics, G, pieces) float32; None with LAST
    c1_ptr, c2_ptr,  # (statistics, G) float32: written here, or read with LAST; or None
    inverse, C, G, S, share, pre_row, scale_row, shift_row, inner,
    x_outer, x_step, x_channel, x_position, g_outer, g_step, g_channel, g_position,
    d_outer, d_step, d_channel, d_position, frames, pieces, splits, blocks,
    CPG: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program writes dx of one of `splits` parts of a group (LAST: block of channels)."""
    S, C = _aligned(S, C, V, LAST)
    x_channel, x_position = _aligned(x_channel, x_position, V, LAST)
    g_channel, g_position = _aligned(g_channel, g_position, V, LAST)
    d_channel, d_position = _aligned(d_channel, d_position, V, LAST)
    r, split, which, begin, end = _part(tl.program_id(0), C, G, splits, CPG, CHANNELS, LAST)
    x_ptr += _row_offset(r, inner, x_outer, x_step, V)
    g_ptr += _row_offset(r, inner, g_outer, g_step, V)
    dx_ptr += _row_offset(r, inner, d_outer, d_step, V)
    first = split * blocks
    stop = tl.minimum(first + blocks, tl.cdiv(S, POSITIONS))
    j = tl.arange(0, CHANNELS)
    if not LAST:
        p = tl.arange(0, PIECES)
        to = (r // frames) * G + which
        c1 = tl.sum(tl.load(part1_ptr + to * pieces + p, mask=p < pieces, other=0.0)) * inverse
        c2 = tl.sum(tl.load(part2_ptr + to * pieces + p, mask=p < pieces, other=0.0)) * inverse
        if c1_ptr is not None:  # noqa: SIM102 (compile-time condition, then run-time)
            if (split == 0) & (r % frames == 0):
                tl.store(c1_ptr + to, c1)
                tl.store(c2_ptr + to, c2)
        c1 *= tl.full((CHANNELS,), 1.0, tl.float32)
        c2 *= tl.full((CHANNELS,), 1.0, tl.float32)
    for c0 in tl.range(begin, end, CHANNELS):
        c = c0 + j
        live = c < end
        gain, offset = _affine(
            c, live, r // share, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row
        )
        pre = _pre(c, live, r // share, pre_ptr, pre_row)
        at = (r // frames) * G + c // CPG
        mean = tl.load(mean_ptr + at, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + at, mask=live, other=0.0)
        if LAST:
            c1 = tl.load(c1_ptr + at, mask=live, other=0.0)
            c2 = tl.load(c2_ptr + at, mask=live, other=0.0)
        c0_ = tl.cast(c0, tl.int64)
        _write_dx(
            x_ptr + c0_ * x_channel, g_ptr + c0_ * g_channel, dx_ptr + c0_ * d_channel, j, live,
            mean, rstd, pre, gain, offset, c1, c2, first, stop, S,
            x_channel, x_position, g_channel, g_position, d_channel, d_position,
            POSITIONS, SILU, LAST,
        )  # fmt: skip


@triton.jit
def group_norm_finish_kernel(
    a_ptr, bq_ptr, h_ptr,  # (parameter rows, pieces, C) float32 sums; h may be None
    c1_ptr, c2_ptr, rstd_ptr,  # (statistics, G) float32; c1 and c2 may be None
    w_ptr, b_ptr,  # (C,) or None
    scale_ptr,  # (parameter rows, C) or None
    dw_ptr, db_ptr,  # (C,) or None
    dpre_ptr, dscale_ptr, dshift_ptr,  # (parameter rows, C) contiguous, or None
    N, C, G, S, scale_row, frames, share, splits,
    CPG: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program computes all gradients except dx for a block of channels, from the sums."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    dw = tl.zeros((CHANNELS,), tl.float32)
    db = tl.zeros((CHANNELS,), tl.float32)
    w = tl.full((CHANNELS,), 1.0, tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    pieces = share * splits
    for n0 in tl.range(0, N, ROWS):
        n = n0 + tl.arange(0, ROWS)
        ok = (n < N)[:, None] & (c < C)[None, :]
        scale = tl.full((ROWS, CHANNELS), 1.0, tl.float32)
        if scale_ptr is not None:
            scale_at = scale_ptr + n.to(tl.int64)[:, None] * scale_row + c[None, :]
            scale += tl.load(scale_at, mask=ok, other=0.0).to(tl.float32)
        a = tl.zeros((ROWS, CHANNELS), tl.float32)
        bq = tl.zeros((ROWS, CHANNELS), tl.float32)
        dpre = tl.zeros((ROWS, CHANNELS), tl.float32)
        for p0 in tl.range(0, pieces, PIECES):
            p = p0 + tl.arange(0, PIECES)
            valid = ok[:, None, :] & (p < pieces)[None, :, None]
            piece = (n[:, None] * pieces + p[None, :]).to(tl.int64)  # (rows, pieces)
            at = piece[:, :, None] * C + c[None, None, :]
            a_p = tl.load(a_ptr + at, mask=valid, other=0.0)
            a += tl.sum(a_p, 1)
            bq += tl.sum(tl.load(bq_ptr + at, mask=valid, other=0.0), 1)
            if dpre_ptr is not None:
                row = n[:, None] * share + (p // splits)[None, :]
                stat = (row // frames)[:, :, None] * G + (c // CPG)[None, None, :]
                rstd = tl.load(rstd_ptr + stat, mask=valid, other=0.0)
                c1 = tl.load(c1_ptr + stat, mask=valid, other=0.0)
                c2 = tl.load(c2_ptr + stat, mask=valid, other=0.0)
                h = tl.load(h_ptr + at, mask=valid, other=0.0)
                size = tl.where(p % splits == 0, S, 0).to(tl.float32)[None, :, None]
                gain = (w[None, :] * scale)[:, None, :]
                dpre += tl.sum(rstd * (gain * a_p - size * c1 - h * c2), 1)
        dw += tl.sum(tl.where(ok, scale * bq, 0.0), 0)
        db += tl.sum(tl.where(ok, scale * a, 0.0), 0)
        to = n.to(tl.int64)[:, None] * C + c[None, :]
        if dpre_ptr is not None:
            tl.store(dpre_ptr + to, dpre, mask=ok)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + to, a, mask=ok)
        if dscale_ptr is not None:
            dscale = w[None, :] * bq
            if b_ptr is not None:
                bias = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
                dscale += bias[None, :] * a
            tl.store(dscale_ptr + to, dscale, mask=ok)
    if dw_ptr is not None:
        tl.store(dw_ptr + c, dw, mask=c < C)
    if db_ptr is not None:
        tl.store(db_ptr + c, db, mask=c < C)
