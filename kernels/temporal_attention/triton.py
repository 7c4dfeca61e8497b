"""Temporal attention kernels, forward and backward. README.md has the derivation.

One program is one head at one spatial position. Its rows of scores fit into registers, so there is
no running softmax, and only the inputs are saved for the backward pass. If not all rows fit, it
processes ROWS of them at a time. Programs of one position are adjacent (head fastest) and read
adjacent runs of D elements of the same tokens.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Kernel bodies are Triton's language, not Python: constexpr arguments and tl.range have no types.

# no `from __future__ import annotations`: Triton reads the annotations

from math import e, log2

import triton
import triton.language as tl

LOG2E = tl.constexpr(log2(e))


@triton.jit
def _load(ptr, rows, columns, ok, D: tl.constexpr):
    """(frames, width) of one head at one position; zeros outside."""
    mask = ok[:, None] & (columns < D)[None, :]
    return tl.load(ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, rows, columns, ok, x, D: tl.constexpr):
    mask = ok[:, None] & (columns < D)[None, :]
    tl.store(ptr + rows[:, None] + columns[None, :], x, mask=mask)


@triton.jit
def _write(
    ptr, rows, columns, ok, a, b, add, ADD: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Stores a @ b (rows, width) unless ptr is None; with ADD and `add`, adds it to memory."""
    if ptr is not None:
        x = tl.dot(a, b, input_precision=PRECISION)
        if ADD:
            x += _load(ptr, rows, columns, ok & add, D)
        _store(ptr, rows, columns, ok, x, D)


@triton.jit
def _rows(b, t, s, h, stride_b, stride_t, stride_s, stride_h, V: tl.constexpr):
    """(frames,) int64 offsets of the first element of each frame, all multiples of V."""
    start = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    start += tl.cast(s, tl.int64) * stride_s
    return tl.multiple_of(start + t.to(tl.int64) * stride_t, [V])


@triton.jit
def _softmax(scores, bias_ptr, scale, h, T, i, j, FRAMES: tl.constexpr, CAUSAL: tl.constexpr):
    """softmax(scores * scale + bias) of frames i over the frames j they attend to; float32.

    A fully masked row gives zeros, as in scaled_dot_product_attention.
    """
    scores = scores * (scale * LOG2E)
    visible = (j < T)[None, :]
    if CAUSAL:
        visible = visible & (j[None, :] <= i[:, None])
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h * FRAMES * FRAMES + i[:, None] * FRAMES + j[None, :])
        scores += bias.to(tl.float32) * LOG2E
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.max(scores, 1)
    p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _add_chunks(
    total, a_ptr, a_rows, a_ok, b_ptr, b_rows, b_ok, d, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + a b^T over all chunks of D but the first."""
    for chunk in tl.range(1, CHUNKS):
        a = _load(a_ptr, a_rows, chunk * WIDTH + d, a_ok, D)
        b = _load(b_ptr, b_rows, chunk * WIDTH + d, b_ok, D)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def temporal_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (B, T, S, H, D) through their strides
    bias_ptr,  # (H, FRAMES, FRAMES) contiguous, zeros outside (T, T), or None
    o_ptr,  # (B, T, S, H*D) contiguous
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, o_b, o_t, o_s, o_h,
    D: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    V: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program is one (batch, position, head)."""
    pid = tl.program_id(0)
    h = pid % H
    s = (pid // H) % S
    b = pid // H // S
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    ok = t < T
    k_rows = _rows(b, t, s, h, k_b, k_t, k_s, k_h, V)
    v_rows = _rows(b, t, s, h, v_b, v_t, v_s, v_h, V)

    for first in tl.range(0, FRAMES, ROWS):
        i = first + tl.arange(0, ROWS)
        q_rows = _rows(b, i, s, h, q_b, q_t, q_s, q_h, V)
        o_rows = _rows(b, i, s, h, o_b, o_t, o_s, o_h, V)
        scores = tl.zeros((ROWS, FRAMES), tl.float32)
        for chunk in tl.range(CHUNKS):
            q = _load(q_ptr, q_rows, chunk * WIDTH + d, i < T, D)
            k = _load(k_ptr, k_rows, chunk * WIDTH + d, ok, D)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        p = _softmax(scores, bias_ptr, scale, h, T, i, t, FRAMES, CAUSAL)
        p = p.to(v_ptr.dtype.element_ty)
        for chunk in tl.range(CHUNKS):
            v = _load(v_ptr, v_rows, chunk * WIDTH + d, ok, D)
            o = tl.dot(p, v, input_precision=PRECISION)
            _store(o_ptr, o_rows, chunk * WIDTH + d, i < T, o, D)


@triton.jit
def temporal_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr,  # (B, T, S, H, D) through their strides; g is the output's gradient
    bias_ptr,  # (H, FRAMES, FRAMES) contiguous, zeros outside (T, T), or None
    dq_ptr, dk_ptr, dv_ptr,  # (B, T, S, H, D) through their own strides, each may be None
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, g_b, g_t, g_s, g_h,
    d_b, d_t, d_s, d_h,
    D: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    V: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program is one (batch, position, head).

    With fewer ROWS than FRAMES, dk and dv accumulate in memory and must be float32.
    """
    ADD: tl.constexpr = ROWS < FRAMES
    pid = tl.program_id(0)
    h = pid % H
    s = (pid // H) % S
    b = pid // H // S
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    half = q_ptr.dtype.element_ty
    ok = t < T
    k_rows = _rows(b, t, s, h, k_b, k_t, k_s, k_h, V)
    v_rows = _rows(b, t, s, h, v_b, v_t, v_s, v_h, V)
    d_rows = _rows(b, t, s, h, d_b, d_t, d_s, d_h, V)

    # no loop-invariant code motion: hoisted values would not fit into registers
    for first in tl.range(0, FRAMES, ROWS, disable_licm=ADD):
        i = first + tl.arange(0, ROWS)
        live = i < T
        q_rows = _rows(b, i, s, h, q_b, q_t, q_s, q_h, V)
        g_rows = _rows(b, i, s, h, g_b, g_t, g_s, g_h, V)
        i_rows = _rows(b, i, s, h, d_b, d_t, d_s, d_h, V)
        q = _load(q_ptr, q_rows, d, live, D)
        k = _load(k_ptr, k_rows, d, ok, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _add_chunks(
            scores, q_ptr, q_rows, live, k_ptr, k_rows, ok, d, D, WIDTH, CHUNKS, PRECISION
        )
        p = _softmax(scores, bias_ptr, scale, h, T, i, t, FRAMES, CAUSAL)
        g = _load(g_ptr, g_rows, d, live, D)
        v = _load(v_ptr, v_rows, d, ok, D)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dp = _add_chunks(dp, g_ptr, g_rows, live, v_ptr, v_rows, ok, d, D, WIDTH, CHUNKS, PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        pt = tl.trans(p.to(half))
        ds = (ds * scale).to(half)
        if CHUNKS == 1:
            _write(dq_ptr, i_rows, d, live, ds, k, False, False, D, PRECISION)
            _write(dk_ptr, d_rows, d, ok, tl.trans(ds), q, first > 0, ADD, D, PRECISION)
            _write(dv_ptr, d_rows, d, ok, pt, g, first > 0, ADD, D, PRECISION)
        else:  # reload from the L1 cache: the chunks do not fit into registers
            for chunk in tl.range(CHUNKS):
                c = chunk * WIDTH + d
                kc = _load(k_ptr, k_rows, c, ok, D)
                _write(dq_ptr, i_rows, c, live, ds, kc, False, False, D, PRECISION)
                qc = _load(q_ptr, q_rows, c, live, D)
                _write(dk_ptr, d_rows, c, ok, tl.trans(ds), qc, first > 0, ADD, D, PRECISION)
                gc = _load(g_ptr, g_rows, c, live, D)
                _write(dv_ptr, d_rows, c, ok, pt, gc, first > 0, ADD, D, PRECISION)
        if ADD:
            tl.debug_barrier()  # the next rows add to values that other threads may have written


@triton.jit
def temporal_attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr,  # (B, T, S, H, D) through their strides; g is the output's gradient
    bias_ptr,  # (H, FRAMES, FRAMES) contiguous, zeros outside (T, T), or None
    part_ptr,  # (B * groups, H, FRAMES, FRAMES) float32
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, g_b, g_t, g_s, g_h,
    D: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, POSITIONS: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums ROWS rows of the bias's gradient over POSITIONS positions of one head."""
    pid = tl.program_id(0)
    groups = tl.cdiv(S, POSITIONS)
    h = pid % H
    i = (pid // H) % (FRAMES // ROWS) * ROWS + tl.arange(0, ROWS)
    group = pid // H // (FRAMES // ROWS)  # of all clips
    b = group // groups
    first = group % groups * POSITIONS
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, FRAMES), tl.float32)
    for n in tl.range(first, tl.minimum(first + POSITIONS, S)):
        q_rows = _rows(b, i, n, h, q_b, q_t, q_s, q_h, V)
        k_rows = _rows(b, t, n, h, k_b, k_t, k_s, k_h, V)
        v_rows = _rows(b, t, n, h, v_b, v_t, v_s, v_h, V)
        g_rows = _rows(b, i, n, h, g_b, g_t, g_s, g_h, V)
        scores = tl.zeros((ROWS, FRAMES), tl.float32)
        dp = tl.zeros((ROWS, FRAMES), tl.float32)
        for chunk in tl.range(CHUNKS):
            q = _load(q_ptr, q_rows, chunk * WIDTH + d, i < T, D)
            k = _load(k_ptr, k_rows, chunk * WIDTH + d, t < T, D)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            g = _load(g_ptr, g_rows, chunk * WIDTH + d, i < T, D)
            v = _load(v_ptr, v_rows, chunk * WIDTH + d, t < T, D)
            dp = tl.dot(g, tl.trans(v), dp, input_precision=PRECISION)
        p = _softmax(scores, bias_ptr, scale, h, T, i, t, FRAMES, CAUSAL)
        total += p * (dp - tl.sum(p * dp, 1)[:, None])
    at = part_ptr + (group.to(tl.int64) * H + h) * FRAMES * FRAMES
    tl.store(at + i[:, None] * FRAMES + t[None, :], total)
