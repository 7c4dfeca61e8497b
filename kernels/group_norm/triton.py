"""Group norm with its neighbours, forward and backward, in Triton. README.md has the derivation.

A *row* is one picture: channels by places, reached through strides. `frames` rows share their
statistics. With places side by side in memory a group that fits into registers is one program
(`fwd`); a larger one is measured in pieces (`stats`) and written by a second launch (`apply`). With
channels side by side (channels last) pieces are blocks of channels, whatever the groups, so a small
launch between the two (`merge`) adds them up.
"""

# no `from __future__ import annotations`: Triton reads the annotations

import triton
import triton.language as tl

# --- shared by the kernels ------------------------------------------------------------------------


@triton.jit
def _whole(x, V: tl.constexpr):
    """x, a multiple of V, in a form that tells the compiler so; a hint would not survive it."""
    return x // V * V


@triton.jit
def _start(r, inner, outer, step, V: tl.constexpr):
    """int64 offset of row r, a multiple of V."""
    return _whole((r // inner).to(tl.int64) * outer + (r % inner).to(tl.int64) * step, V)


@triton.jit
def _affine(c, ok, r, w_ptr, b_ptr, scale_ptr, shift_ptr, scale_row, shift_row):
    """gain and offset of channels c in row r of the parameters: z = gain * normalised + offset."""
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
    """What is added to channels c of row r before anything else."""
    pre = tl.where(ok, 0.0, 0.0)
    if pre_ptr is not None:
        at = pre_ptr + r.to(tl.int64) * pre_row + c
        pre = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    return pre


@triton.jit
def _at(ptr, c, s, channel, place, LAST: tl.constexpr):
    """Pointers of (channels, places), both counted from ptr."""
    if LAST:
        return ptr + (s.to(tl.int64) * place)[None, :] + c[:, None]
    else:
        return ptr + (c.to(tl.int64) * channel)[:, None] + s[None, :]


@triton.jit
def _joined(n, mean, m2, k, mean_k, m2_k):
    """Count, mean and sum of squared distances of two sets (Chan et al. 1983, eq. 2.1)."""
    total = n + k
    delta = mean_k - mean
    mean += delta * (k / total)
    m2 += m2_k + delta * delta * (n * (k / total))
    return total, mean, m2


@triton.jit
def _dz(xh, dy, gain, offset, SILU: tl.constexpr):
    """The gradient before the activation; a sigmoid of 0 or 1 is exact, so nothing overflows."""
    if SILU:
        z = xh * gain + offset
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def group_norm_fwd_kernel(
    x_ptr, y_ptr,  # rows of (C, S), places side by side
    mean_ptr, rstd_ptr,  # (statistics, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    eps, C, G, share, pre_row, scale_row, shift_row,
    inner, x_outer, x_step, x_channel, y_outer, y_step, y_channel,
    FRAMES: tl.constexpr, CPG: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program is one group, all of it in registers, in runs of V places of one channel."""
    pid = tl.program_id(0)
    group = pid % G
    e = tl.arange(0, BLOCK // V) * V
    ok = e < FRAMES * CPG * S
    c = group * CPG + (e // S) % CPG
    s = e % S
    r = (pid // G) * FRAMES + e // (CPG * S)
    if FRAMES == 1:
        r = pid // G
    x_at = _start(r, inner, x_outer, x_step, V) + c.to(tl.int64) * x_channel + s
    y_at = _start(r, inner, y_outer, y_step, V) + c.to(tl.int64) * y_channel + s
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
    x_ptr,  # rows of (C, S), places side by side
    pre_ptr,  # (parameter rows, C) or None
    mean_ptr, m2_ptr,  # (statistics, G, FRAMES * splits) float32
    G, S, share, pre_row, inner, x_outer, x_step, x_channel, frames, splits, blocks,
    CPG: tl.constexpr, BLOCK: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One program is one of `splits` pieces of a group in a row, `blocks` steps long."""
    pid = tl.program_id(0)
    split = pid % splits
    group = (pid // splits) % G
    r = pid // splits // G
    start = _start(r, inner, x_outer, x_step, V)
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
        n, mean, m2 = _joined(n, mean, m2, k, mean_k, tl.sum(u * u))
    at = ((r // frames) * G + group) * (frames * splits) + (r % frames) * splits + split
    tl.store(mean_ptr + at, mean)
    tl.store(m2_ptr + at, m2)


@triton.jit
def group_norm_last_stats_kernel(
    x_ptr,  # rows of (S, C), channels side by side
    pre_ptr,  # (parameter rows, C) or None
    mean_ptr, m2_ptr,  # (rows, splits, C) float32
    C, S, share, pre_row, inner, x_outer, x_step, x_place, splits, blocks,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """One program is a block of channels in one of `splits` pieces of a row; each channel alone."""
    pid = tl.program_id(0)
    C = _whole(C, V)
    x_place = _whole(x_place, V)
    chunks = tl.cdiv(C, CHANNELS)
    split = (pid // chunks) % splits
    r = pid // chunks // splits
    c = (pid % chunks) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += _start(r, inner, x_outer, x_step, V)
    pre = _pre(c, c < C, r // share, pre_ptr, pre_row)
    n = 0.0
    mean = tl.zeros((CHANNELS,), tl.float32)
    m2 = tl.zeros((CHANNELS,), tl.float32)
    first = split * blocks
    for block in tl.range(first, tl.minimum(first + blocks, tl.cdiv(S, PLACES))):
        s = block * PLACES + tl.arange(0, PLACES)
        ok = (c < C)[:, None] & (s < S)[None, :]
        u = tl.load(_at(x_ptr, c, s, 1, x_place, True), mask=ok, other=0.0).to(tl.float32)
        u += pre[:, None]
        k = tl.minimum(PLACES, S - block * PLACES).to(tl.float32)
        mean_k = tl.sum(tl.where(ok, u, 0.0), 1) / k
        u = tl.where(ok, u - mean_k[:, None], 0.0)
        n, mean, m2 = _joined(n, mean, m2, k, mean_k, tl.sum(u * u, 1))
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
    """One program is one group: the pieces of its channels, ROWS of them at a time."""
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
        apart = means - mean_k
        m2_k = tl.load(part_m2_ptr + at, mask=ok, other=0.0) + size[:, None] * apart * apart
        n, mean, m2 = _joined(n, mean, m2, k, mean_k, tl.sum(tl.where(ok, m2_k, 0.0)))
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, tl.rsqrt(m2 / n + eps))


@triton.jit
def group_norm_apply_kernel(
    x_ptr, y_ptr,  # rows of (C, S) or, with LAST, (S, C)
    part_mean_ptr, part_m2_ptr,  # (statistics, G, frames * pieces) float32; None with LAST
    mean_ptr, rstd_ptr,  # (statistics, G) float32: written here, or read with LAST
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    eps, C, G, S, share, pre_row, scale_row, shift_row,
    inner, x_outer, x_step, x_channel, x_place, y_outer, y_step, y_channel, y_place,
    frames, pieces, length, splits, blocks,
    CPG: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program is one of `splits` pieces of a group (LAST: of a block of channels) of a row.

    It walks from the end: what the launch before it read last is still in the second cache.
    """
    pid = tl.program_id(0)
    if LAST:
        C = _whole(C, V)
        x_place = _whole(x_place, V)
        y_place = _whole(y_place, V)
    else:
        S = _whole(S, V)
        x_channel = _whole(x_channel, V)
        y_channel = _whole(y_channel, V)
    per_row = tl.cdiv(C, CHANNELS) if LAST else G
    which = pid % per_row
    split = (pid // per_row) % splits
    r = pid // per_row // splits
    x_ptr += _start(r, inner, x_outer, x_step, V)
    y_ptr += _start(r, inner, y_outer, y_step, V)
    begin = which * (CHANNELS if LAST else CPG)
    end = tl.minimum(begin + CHANNELS, C) if LAST else begin + CPG

    if not LAST:
        p = tl.arange(0, PIECES)
        there = p < frames * pieces
        at = ((r // frames) * G + which) * (frames * pieces) + p
        size = tl.minimum(length, CPG * S - (p % pieces) * length)
        size = tl.where(there, size, 0).to(tl.float32)
        count = tl.sum(size)
        means = tl.load(part_mean_ptr + at, mask=there, other=0.0)
        mean = tl.sum(means * size) / count
        apart = tl.where(there, means - mean, 0.0)
        m2 = tl.load(part_m2_ptr + at, mask=there, other=0.0) + size * apart * apart
        rstd = tl.rsqrt(tl.sum(m2) / count + eps)
        if (split == 0) & (r % frames == 0):
            tl.store(mean_ptr + (r // frames) * G + which, mean)
            tl.store(rstd_ptr + (r // frames) * G + which, rstd)

    last = tl.minimum((split + 1) * blocks, tl.cdiv(S, PLACES)) - 1
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
            s = (last - back) * PLACES + tl.arange(0, PLACES)
            ok = live[:, None] & (s < S)[None, :]
            x = tl.load(_at(x_c, j, s, x_channel, x_place, LAST), mask=ok, other=0.0)
            z = (x.to(tl.float32) + pre - mean) * factor + offset[:, None]
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(_at(y_c, j, s, y_channel, y_place, LAST), z, mask=ok)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _normalised(
    x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
    x_channel, x_place, g_channel, g_place, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """(the normalised x, the gradient before the activation) of (channels, places)."""
    x = tl.load(_at(x_ptr, j, s, x_channel, x_place, LAST), mask=ok, other=0.0).to(tl.float32)
    g = tl.load(_at(g_ptr, j, s, g_channel, g_place, LAST), mask=ok, other=0.0).to(tl.float32)
    xh = (x + pre[:, None] - mean[:, None]) * rstd[:, None]
    return xh, _dz(xh, g, gain[:, None], offset[:, None], SILU)


@triton.jit
def _sums(
    x_ptr, g_ptr, j, live, mean, rstd, pre, gain, offset, first, stop, S,
    x_channel, x_place, g_channel, g_place,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
    HATS: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz * xh and, with HATS, xh, of each channel over blocks of places."""
    a = tl.zeros((CHANNELS, PLACES), tl.float32)
    b = tl.zeros((CHANNELS, PLACES), tl.float32)
    h = tl.zeros((CHANNELS, PLACES), tl.float32)
    for block in tl.range(first, stop):
        s = block * PLACES + tl.arange(0, PLACES)
        ok = live[:, None] & (s < S)[None, :]
        xh, dz = _normalised(
            x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
            x_channel, x_place, g_channel, g_place, SILU, LAST,
        )  # fmt: skip
        a += dz
        b += dz * xh
        if HATS:
            h += tl.where(ok, xh, 0.0)
    return tl.sum(a, 1), tl.sum(b, 1), tl.sum(h, 1)


@triton.jit
def _write_dx(
    x_ptr, g_ptr, dx_ptr, j, live, mean, rstd, pre, gain, offset, c1, c2, first, stop, S,
    x_channel, x_place, g_channel, g_place, d_channel, d_place,
    PLACES: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * dz - c1 - xh * c2), from the last block to the first."""
    for back in tl.range(stop - first):
        s = (stop - 1 - back) * PLACES + tl.arange(0, PLACES)
        ok = live[:, None] & (s < S)[None, :]
        xh, dz = _normalised(
            x_ptr, g_ptr, j, s, ok, mean, rstd, pre, gain, offset,
            x_channel, x_place, g_channel, g_place, SILU, LAST,
        )  # fmt: skip
        dx = rstd[:, None] * (gain[:, None] * dz - c1[:, None] - xh * c2[:, None])
        tl.store(_at(dx_ptr, j, s, d_channel, d_place, LAST), dx, mask=ok)


@triton.jit
def group_norm_bwd_kernel(
    x_ptr, g_ptr, dx_ptr,  # rows of (C, S), places side by side; g is the output's gradient
    mean_ptr, rstd_ptr,  # (rows, G) float32
    w_ptr, b_ptr,  # (C,) or None
    pre_ptr, scale_ptr, shift_ptr,  # (parameter rows, C) or None
    a_ptr, bq_ptr, h_ptr,  # (rows, C) float32 sums, or None
    c1_ptr, c2_ptr,  # (rows, G) float32, or None
    inverse, C, G, S, share, pre_row, scale_row, shift_row, inner,
    x_outer, x_step, x_channel, g_outer, g_step, g_channel, d_outer, d_step, d_channel,
    CPG: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, V: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One program is one group of one row: its sums, then dx, for which it reads all again."""
    pid = tl.program_id(0)
    S = _whole(S, V)
    x_channel = _whole(x_channel, V)
    g_channel = _whole(g_channel, V)
    d_channel = _whole(d_channel, V)
    group = pid % G
    r = pid // G
    x_ptr += _start(r, inner, x_outer, x_step, V)
    g_ptr += _start(r, inner, g_outer, g_step, V)
    dx_ptr += _start(r, inner, d_outer, d_step, V)
    j = tl.arange(0, CHANNELS)
    ones = tl.full((CHANNELS,), 1.0, tl.float32)
    mean = tl.load(mean_ptr + pid) * ones
    rstd = tl.load(rstd_ptr + pid) * ones
    begin = group * CPG
    end = begin + CPG
    blocks = tl.cdiv(S, PLACES)
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
            CHANNELS, PLACES, SILU, False, h_ptr is not None,
        )  # fmt: skip
        c1 += tl.sum(gain * a)
        c2 += tl.sum(gain * bq)
        at = r.to(tl.int64) * C + c
        if a_ptr is not None:
            tl.store(a_ptr + at, a, mask=live)
            tl.store(bq_ptr + at, bq, mask=live)
        if h_ptr is not None:
            tl.store(h_ptr + at, h, mask=live)
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
            x_channel, 1, g_channel, 1, d_channel, 1, PLACES, SILU, False,
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
    x_outer, x_step, x_channel, x_place, g_outer, g_step, g_channel, g_place,
    frames, splits, blocks,
    CPG: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, V: tl.constexpr,
    SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program is one of `splits` pieces of a group (LAST: of a block of channels) of a row."""
    pid = tl.program_id(0)
    if LAST:
        C = _whole(C, V)
        x_place = _whole(x_place, V)
        g_place = _whole(g_place, V)
    else:
        S = _whole(S, V)
        x_channel = _whole(x_channel, V)
        g_channel = _whole(g_channel, V)
    per_row = tl.cdiv(C, CHANNELS) if LAST else G
    which = pid % per_row
    split = (pid // per_row) % splits
    r = pid // per_row // splits
    x_ptr += _start(r, inner, x_outer, x_step, V)
    g_ptr += _start(r, inner, g_outer, g_step, V)
    begin = which * (CHANNELS if LAST else CPG)
    end = tl.minimum(begin + CHANNELS, C) if LAST else begin + CPG
    first = split * blocks
    stop = tl.minimum(first + blocks, tl.cdiv(S, PLACES))
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
            offset, first, stop, S, x_channel, x_place, g_channel, g_place,
            CHANNELS, PLACES, SILU, LAST, h_ptr is not None,
        )  # fmt: skip
        c1 += tl.sum(gain * a)
        c2 += tl.sum(gain * bq)
        to = (r * splits + split).to(tl.int64) * C + c
        if a_ptr is not None:
            tl.store(a_ptr + to, a, mask=live)
            tl.store(bq_ptr + to, bq, mask=live)
        if h_ptr is not None:
            tl.store(h_ptr + to, h, mask=live)
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
    """One program is one group: the sums of its channels, ROWS pieces at a time."""
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
    x_outer, x_step, x_channel, x_place, g_outer, g_step, g_channel, g_place,
    d_outer, d_step, d_channel, d_place, frames, pieces, splits, blocks,
    CPG: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
    V: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program is one of `splits` pieces of a group (LAST: of a block of channels) of a row."""
    pid = tl.program_id(0)
    if LAST:
        C = _whole(C, V)
        x_place = _whole(x_place, V)
        g_place = _whole(g_place, V)
        d_place = _whole(d_place, V)
    else:
        S = _whole(S, V)
        x_channel = _whole(x_channel, V)
        g_channel = _whole(g_channel, V)
        d_channel = _whole(d_channel, V)
    per_row = tl.cdiv(C, CHANNELS) if LAST else G
    which = pid % per_row
    split = (pid // per_row) % splits
    r = pid // per_row // splits
    x_ptr += _start(r, inner, x_outer, x_step, V)
    g_ptr += _start(r, inner, g_outer, g_step, V)
    dx_ptr += _start(r, inner, d_outer, d_step, V)
    begin = which * (CHANNELS if LAST else CPG)
    end = tl.minimum(begin + CHANNELS, C) if LAST else begin + CPG
    first = split * blocks
    stop = tl.minimum(first + blocks, tl.cdiv(S, PLACES))
    j = tl.arange(0, CHANNELS)
    if not LAST:
        p = tl.arange(0, PIECES)
        to = (r // frames) * G + which
        c1 = tl.sum(tl.load(part1_ptr + to * pieces + p, mask=p < pieces, other=0.0)) * inverse
        c2 = tl.sum(tl.load(part2_ptr + to * pieces + p, mask=p < pieces, other=0.0)) * inverse
        if c1_ptr is not None:  # noqa: SIM102 (one is known when compiling, one is not)
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
            x_channel, x_place, g_channel, g_place, d_channel, d_place, PLACES, SILU, LAST,
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
    """One program is a block of channels: the gradients of everything but x, from the sums."""
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
            there = ok[:, None, :] & (p < pieces)[None, :, None]
            piece = (n[:, None] * pieces + p[None, :]).to(tl.int64)  # (rows, pieces)
            at = piece[:, :, None] * C + c[None, None, :]
            a_p = tl.load(a_ptr + at, mask=there, other=0.0)
            a += tl.sum(a_p, 1)
            bq += tl.sum(tl.load(bq_ptr + at, mask=there, other=0.0), 1)
            if dpre_ptr is not None:
                row = n[:, None] * share + (p // splits)[None, :]
                stat = (row // frames)[:, :, None] * G + (c // CPG)[None, None, :]
                rstd = tl.load(rstd_ptr + stat, mask=there, other=0.0)
                c1 = tl.load(c1_ptr + stat, mask=there, other=0.0)
                c2 = tl.load(c2_ptr + stat, mask=there, other=0.0)
                h = tl.load(h_ptr + at, mask=there, other=0.0)
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
