"""Temporal attention, forward and backward, in Triton. README.md has the derivation.

One program is one head at one place: all T frames of it fit in registers, so there is no running
softmax and nothing is saved for the backward pass but the inputs. Programs of one place are
neighbours (head fastest), and read neighbouring runs of D numbers of the same tokens.
"""

# no `from __future__ import annotations`: Triton reads the annotations

from functools import lru_cache
from math import e, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import HIP, Launch

LOG2E = tl.constexpr(log2(e))


class Tile(NamedTuple):
    """How a call is laid out: T padded to `frames`, D in `chunks` of `width`, `warps` a program."""

    frames: int
    width: int
    chunks: int
    warps: int


MAX_DIM = 160
# (bytes of an element, with bias) -> frames at most. Beyond it some GPU would spill registers;
# tests/kernels/test_compiled.py compiles all that `tile` can return, and finds no spill.
MAX_FRAMES = {(2, False): 128, (2, True): 64, (4, False): 64, (4, True): 32}
# (bytes of an element, padded frames) -> (width of a chunk of D at most, warps of 32). Chunks bound
# the registers whatever D is, and cost no memory traffic: what is read again is in the first cache.
TABLE = {
    (2, 16): (64, 1), (2, 32): (64, 2), (2, 64): (64, 4), (2, 128): (32, 8),
    (4, 16): (32, 1), (4, 32): (32, 4), (4, 64): (16, 4),
}  # fmt: skip
CHUNK = 32  # of heads wider than a chunk of the table, in half precision
SITES_FOR_BIAS = 16  # places a program adds up before it writes its part of the bias's gradient
MERGED_FRAMES = 32  # up to which one launch has registers for the bias's gradient and the others


def tile(frames: int, dim: int, itemsize: int, hip: bool = HIP) -> Tile:
    """The launch configuration: the only place that picks one."""
    padded = max(16, triton.next_power_of_2(frames))  # 16: the smallest tl.dot
    width, warps = TABLE[itemsize, padded]
    if dim > width and itemsize == 2:
        width = CHUNK
    width = max(16, min(width, triton.next_power_of_2(dim)))
    if hip:  # a warp of these has 64 threads
        warps = max(1, warps // 2)
    return Tile(padded, width, triton.cdiv(dim, width), warps)


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
def _write(ptr, rows, columns, ok, a, b, D: tl.constexpr, PRECISION: tl.constexpr):
    """a (frames, frames) @ b (frames, width), where that gradient is wanted."""
    if ptr is not None:
        _store(ptr, rows, columns, ok, tl.dot(a, b, input_precision=PRECISION), D)


@triton.jit
def _rows(b, t, site, h, stride_b, stride_t, stride_s, stride_h, V: tl.constexpr):
    """(frames,) int64 offsets of the first number of each frame; all are multiples of V."""
    start = b.to(tl.int64) * stride_b + site.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    return tl.multiple_of(start + t.to(tl.int64) * stride_t, [V])


@triton.jit
def _softmax(scores, bias_ptr, scale, h, T, t, FRAMES: tl.constexpr, CAUSAL: tl.constexpr):
    """softmax(scores * scale + bias) over the frames that are there and may be seen; float32.

    A row of which nothing may be seen gives zeros, as in scaled_dot_product_attention.
    """
    scores = scores * (scale * LOG2E)
    seen = (t < T)[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= t[:, None])
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h * FRAMES * FRAMES + t[:, None] * FRAMES + t[None, :])
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
    D: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
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
    q_rows = _rows(b, t, site, h, q_b, q_t, q_s, q_h, V)
    k_rows = _rows(b, t, site, h, k_b, k_t, k_s, k_h, V)
    v_rows = _rows(b, t, site, h, v_b, v_t, v_s, v_h, V)
    o_rows = _rows(b, t, site, h, o_b, o_t, o_s, o_h, V)

    scores = tl.zeros((FRAMES, FRAMES), tl.float32)
    for chunk in tl.range(CHUNKS):
        q = _load(q_ptr, q_rows, chunk * WIDTH + d, ok, D)
        k = _load(k_ptr, k_rows, chunk * WIDTH + d, ok, D)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    p = _softmax(scores, bias_ptr, scale, h, T, t, FRAMES, CAUSAL).to(v_ptr.dtype.element_ty)
    for chunk in tl.range(CHUNKS):
        v = _load(v_ptr, v_rows, chunk * WIDTH + d, ok, D)
        o = tl.dot(p, v, input_precision=PRECISION)
        _store(o_ptr, o_rows, chunk * WIDTH + d, ok, o, D)


@triton.jit
def temporal_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr,  # (B, T, S, H, D) through their strides; g is the output's gradient
    bias_ptr,  # (H, FRAMES, FRAMES) contiguous, zeros outside (T, T), or None
    dq_ptr, dk_ptr, dv_ptr,  # (B, T, S, H, D) through strides of their own, each may be None
    part_ptr,  # (programs, FRAMES, FRAMES) float32 parts of the bias's gradient, or None
    scale, T, S, H,
    q_b, q_t, q_s, q_h, k_b, k_t, k_s, k_h, v_b, v_t, v_s, v_h, g_b, g_t, g_s, g_h,
    d_b, d_t, d_s, d_h,
    D: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    SITES: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program is one (batch, group of SITES places, head), the places one after another."""
    pid = tl.program_id(0)
    groups = tl.cdiv(S, SITES)
    h = pid % H
    group = (pid // H) % groups
    b = pid // H // groups
    t = tl.arange(0, FRAMES)
    d = tl.arange(0, WIDTH)
    half = q_ptr.dtype.element_ty
    ok = t < T

    here = 1 if SITES == 1 else tl.minimum(SITES, S - group * SITES)
    for i in tl.range(here):
        site = group * SITES + i
        q_rows = _rows(b, t, site, h, q_b, q_t, q_s, q_h, V)
        k_rows = _rows(b, t, site, h, k_b, k_t, k_s, k_h, V)
        v_rows = _rows(b, t, site, h, v_b, v_t, v_s, v_h, V)
        g_rows = _rows(b, t, site, h, g_b, g_t, g_s, g_h, V)
        d_rows = _rows(b, t, site, h, d_b, d_t, d_s, d_h, V)

        q = _load(q_ptr, q_rows, d, ok, D)
        k = _load(k_ptr, k_rows, d, ok, D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        for chunk in tl.range(1, CHUNKS):
            qc = _load(q_ptr, q_rows, chunk * WIDTH + d, ok, D)
            kc = _load(k_ptr, k_rows, chunk * WIDTH + d, ok, D)
            scores = tl.dot(qc, tl.trans(kc), scores, input_precision=PRECISION)
        p = _softmax(scores, bias_ptr, scale, h, T, t, FRAMES, CAUSAL)
        g = _load(g_ptr, g_rows, d, ok, D)
        v = _load(v_ptr, v_rows, d, ok, D)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        for chunk in tl.range(1, CHUNKS):
            gc = _load(g_ptr, g_rows, chunk * WIDTH + d, ok, D)
            vc = _load(v_ptr, v_rows, chunk * WIDTH + d, ok, D)
            dp = tl.dot(gc, tl.trans(vc), dp, input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if part_ptr is not None:
            # In memory, not in registers: with this sum beside everything else they run out.
            at = part_ptr + pid.to(tl.int64) * FRAMES * FRAMES + t[:, None] * FRAMES + t[None, :]
            if i == 0:
                tl.store(at, ds)
            else:
                tl.store(at, tl.load(at) + ds)
            tl.debug_barrier()  # the next place's sum may be read by other threads
        pt = tl.trans(p.to(half))
        ds = (ds * scale).to(half)
        if CHUNKS == 1:
            _write(dq_ptr, d_rows, d, ok, ds, k, D, PRECISION)
            _write(dk_ptr, d_rows, d, ok, tl.trans(ds), q, D, PRECISION)
            _write(dv_ptr, d_rows, d, ok, pt, g, D, PRECISION)
        else:  # read again, from the first cache: held since then they would not fit
            for chunk in tl.range(CHUNKS):
                c = chunk * WIDTH + d
                kc = _load(k_ptr, k_rows, c, ok, D)
                _write(dq_ptr, d_rows, c, ok, ds, kc, D, PRECISION)
                qc = _load(q_ptr, q_rows, c, ok, D)
                _write(dk_ptr, d_rows, c, ok, tl.trans(ds), qc, D, PRECISION)
                gc = _load(g_ptr, g_rows, c, ok, D)
                _write(dv_ptr, d_rows, c, ok, pt, gc, D, PRECISION)


def output(q: Tensor) -> Tensor:
    """What the forward pass fills, contiguous: q (B, T, S, H, D) -> (B, T, S, H*D)."""
    b, t, s, h, d = q.shape
    return q.new_empty((b, t, s, h * d))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    hip: bool = HIP,
) -> tuple[Tensor, list[Launch]]:
    """(output, the launches that fill it): q, k, v (B, T, S, H, D) with unit stride in D."""
    b, t, s, h, d = q.shape
    o = output(q)
    strides = (*_outer(q), *_outer(k), *_outer(v), *_outer(o.view(q.shape)))
    plan = tile(t, d, q.element_size(), hip)
    args = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": _padded(bias, plan), "o_ptr": o,
        "scale": scale, "T": t, "S": s, "H": h, **_named("qkvo", strides),
        **_constants(plan, d, strides, causal, precision(q.dtype, hip)),
    }  # fmt: skip
    return o, [Launch(temporal_attention_fwd_kernel, b * s * h, args, plan.warps)]


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float,
    into: tuple[Tensor | None, Tensor | None, Tensor | None], needs_bias: bool,
    hip: bool = HIP,
) -> tuple[Tensor | None, list[Launch]]:  # fmt: skip
    """(parts of the bias's gradient, the launches): fills `into`, which is dq, dk and dv.

    Each of these may be None, and their strides are equal. The parts are (-1, H, T', T') float32
    with T' >= T, to be added up. g is (B, T, S, H, D) with unit stride in D.
    """
    b, t, s, h, d = q.shape
    plan = tile(t, d, q.element_size(), hip)
    groups = b * triton.cdiv(s, SITES_FOR_BIAS)
    square = (groups, h, plan.frames, plan.frames)
    part = q.new_empty(square, dtype=torch.float32) if needs_bias else None
    one = next((x for x in into if x is not None), q)
    strides = (*_outer(q), *_outer(k), *_outer(v), *_outer(g), *_outer(one))
    common = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "g_ptr": g, "bias_ptr": _padded(bias, plan),
        "scale": scale, "T": t, "S": s, "H": h, **_named("qkvgd", strides),
        **_constants(plan, d, strides, causal, precision(q.dtype, hip)),
    }  # fmt: skip

    def one_launch(into: Any, part: Tensor | None) -> Launch:
        sites = SITES_FOR_BIAS if part is not None else 1
        outputs = {"dq_ptr": into[0], "dk_ptr": into[1], "dv_ptr": into[2], "part_ptr": part}
        programs = b * triton.cdiv(s, sites) * h
        return Launch(
            temporal_attention_bwd_kernel, programs, common | outputs | {"SITES": sites}, plan.warps
        )

    if part is None or (plan.frames <= MERGED_FRAMES and q.element_size() == 2):
        return part, [one_launch(into, part)]
    rest = [one_launch(into, None)] if any(x is not None for x in into) else []
    return part, [*rest, one_launch((None, None, None), part)]  # together they would spill


def _padded(bias: Tensor | None, plan: Tile) -> Tensor | None:
    """(H, T, T) -> (H, T', T'): rows of whole tiles, which threads read four numbers at a time."""
    if bias is None:
        return None
    more = plan.frames - bias.shape[-1]
    return F.pad(bias, (0, more, 0, more)) if more else bias.contiguous()


def _outer(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, frame, place and head; zero where there is one of it."""
    return tuple(st if n > 1 else 0 for n, st in zip(x.shape[:4], x.stride()[:4], strict=True))


def _named(tensors: str, strides: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((f"{x}_{axis}" for x in tensors for axis in "btsh"), strides, strict=True))


def _constants(
    plan: Tile, dim: int, strides: tuple[int, ...], causal: bool, precision: str
) -> dict[str, Any]:
    return {
        "D": dim, "FRAMES": plan.frames, "WIDTH": plan.width, "CHUNKS": plan.chunks,
        "V": aligned((dim, *strides)), "CAUSAL": causal, "PRECISION": precision,
    }  # fmt: skip


@lru_cache(maxsize=4096)
def aligned(numbers: tuple[int, ...]) -> int:
    """The largest of 8, 4, 2 and 1 that divides them all: how many neighbours one load may take."""
    return next(v for v in (8, 4, 2, 1) if all(n % v == 0 for n in numbers))


def precision(dtype: torch.dtype, hip: bool = HIP) -> str:
    """Of products of float32: exact where the matrix units have it, else three of TensorFloat-32.

    The three carry 22 bits of the 24, and need no more registers than a warp has; one alone would
    carry 11.
    """
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"
