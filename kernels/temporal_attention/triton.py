"""Temporal attention, forward and backward, in Triton. README.md has the derivation.

One program is one head at one place. A row of its scores is whole in registers, so there is no
running softmax and nothing is saved for the backward pass but the inputs; where not all rows fit,
it takes ROWS of them at a time. Programs of one place are neighbours (head fastest), and read
neighbouring runs of D numbers of the same tokens.
"""

# no `from __future__ import annotations`: Triton reads the annotations

from math import e, log2

import triton
import triton.language as tl

LOG2E = tl.constexpr(log2(e))


@triton.jit
def _load(ptr, rows, columns, ok, D: tl.constexpr):
    """(frames, width) of one head at one place; zeros outside."""
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
    """a @ b (rows, width), where that gradient is wanted; with ADD, to what is there if `add`."""
    if ptr is not None:
        x = tl.dot(a, b, input_precision=PRECISION)
        if ADD:
            x += _load(ptr, rows, columns, ok & add, D)
        _store(ptr, rows, columns, ok, x, D)


@triton.jit
def _rows(b, t, site, h, stride_b, stride_t, stride_s, stride_h, V: tl.constexpr):
    """(frames,) int64 offsets of the first number of each frame; all are multiples of V."""
    start = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    start += tl.cast(site, tl.int64) * stride_s
    return tl.multiple_of(start + t.to(tl.int64) * stride_t, [V])


@triton.jit
def _softmax(scores, bias_ptr, scale, h, T, i, j, FRAMES: tl.constexpr, CAUSAL: tl.constexpr):
    """softmax(scores * scale + bias) of frames i over those of j that they may see; float32.

    A row of which nothing may be seen gives zeros, as in scaled_dot_product_attention.
    """
    scores = scores * (scale * LOG2E)
    seen = (j < T)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h * FRAMES * FRAMES + i[:, None] * FRAMES + j[None, :])
        scores += bias.to(tl.float32) * LOG2E
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.max(scores, 1)
    p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


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
    """One program is one (batch, place, head)."""
    pid = tl.program_id(0)
    h = pid % H
    site = (pid // H) % S
    b = pid // H // S
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    ok = t < T
    k_rows = _rows(b, t, site, h, k_b, k_t, k_s, k_h, V)
    v_rows = _rows(b, t, site, h, v_b, v_t, v_s, v_h, V)

    for first in tl.range(0, FRAMES, ROWS):
        i = first + tl.arange(0, ROWS)
        q_rows = _rows(b, i, site, h, q_b, q_t, q_s, q_h, V)
        o_rows = _rows(b, i, site, h, o_b, o_t, o_s, o_h, V)
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
    dq_ptr, dk_ptr, dv_ptr,  # (B, T, S, H, D) through strides of their own, each may be None
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, g_b, g_t, g_s, g_h,
    d_b, d_t, d_s, d_h,
    D: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    V: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program is one (batch, place, head).

    With fewer ROWS than FRAMES dk and dv are added up in memory, for which they must be float32.
    """
    ADD: tl.constexpr = ROWS < FRAMES
    pid = tl.program_id(0)
    h = pid % H
    site = (pid // H) % S
    b = pid // H // S
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    half = q_ptr.dtype.element_ty
    ok = t < T
    k_rows = _rows(b, t, site, h, k_b, k_t, k_s, k_h, V)
    v_rows = _rows(b, t, site, h, v_b, v_t, v_s, v_h, V)
    d_rows = _rows(b, t, site, h, d_b, d_t, d_s, d_h, V)

    # what stays the same is computed again for each of the rows: held, it would not fit
    for first in tl.range(0, FRAMES, ROWS, disable_licm=ADD):
        i = first + tl.arange(0, ROWS)
        live = i < T
        q_rows = _rows(b, i, site, h, q_b, q_t, q_s, q_h, V)
        g_rows = _rows(b, i, site, h, g_b, g_t, g_s, g_h, V)
        i_rows = _rows(b, i, site, h, d_b, d_t, d_s, d_h, V)
        q = _load(q_ptr, q_rows, d, live, D)
        k = _load(k_ptr, k_rows, d, ok, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        for chunk in tl.range(1, CHUNKS):
            qc = _load(q_ptr, q_rows, chunk * WIDTH + d, live, D)
            kc = _load(k_ptr, k_rows, chunk * WIDTH + d, ok, D)
            scores = tl.dot(qc, tl.trans(kc), scores, input_precision=PRECISION)
        p = _softmax(scores, bias_ptr, scale, h, T, i, t, FRAMES, CAUSAL)
        g = _load(g_ptr, g_rows, d, live, D)
        v = _load(v_ptr, v_rows, d, ok, D)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        for chunk in tl.range(1, CHUNKS):
            gc = _load(g_ptr, g_rows, chunk * WIDTH + d, live, D)
            vc = _load(v_ptr, v_rows, chunk * WIDTH + d, ok, D)
            dp = tl.dot(gc, tl.trans(vc), dp, input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        pt = tl.trans(p.to(half))
        ds = (ds * scale).to(half)
        if CHUNKS == 1:
            _write(dq_ptr, i_rows, d, live, ds, k, False, False, D, PRECISION)
            _write(dk_ptr, d_rows, d, ok, tl.trans(ds), q, first > 0, ADD, D, PRECISION)
            _write(dv_ptr, d_rows, d, ok, pt, g, first > 0, ADD, D, PRECISION)
        else:  # read again, from the first cache: held since then they would not fit
            for chunk in tl.range(CHUNKS):
                c = chunk * WIDTH + d
                kc = _load(k_ptr, k_rows, c, ok, D)
                _write(dq_ptr, i_rows, c, live, ds, kc, False, False, D, PRECISION)
                qc = _load(q_ptr, q_rows, c, live, D)
                _write(dk_ptr, d_rows, c, ok, tl.trans(ds), qc, first > 0, ADD, D, PRECISION)
                gc = _load(g_ptr, g_rows, c, live, D)
                _write(dv_ptr, d_rows, c, ok, pt, gc, first > 0, ADD, D, PRECISION)
        if ADD:
            tl.debug_barrier()  # the next rows add to what other threads may have written


@triton.jit
def temporal_attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr,  # (B, T, S, H, D) through their strides; g is the output's gradient
    bias_ptr,  # (H, FRAMES, FRAMES) contiguous, zeros outside (T, T), or None
    part_ptr,  # (B * groups, H, FRAMES, FRAMES) float32
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, g_b, g_t, g_s, g_h,
    D: tl.constexpr, FRAMES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr, SITES: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program adds up ROWS rows of the bias's gradient over SITES places of one head."""
    pid = tl.program_id(0)
    groups = tl.cdiv(S, SITES)
    h = pid % H
    i = (pid // H) % (FRAMES // ROWS) * ROWS + tl.arange(0, ROWS)
    group = pid // H // (FRAMES // ROWS)  # of all clips
    b = group // groups
    site = group % groups * SITES
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, FRAMES), tl.float32)
    for n in tl.range(site, tl.minimum(site + SITES, S)):
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
