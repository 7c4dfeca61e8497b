"""Selects the kernels of triton.py that a temporal attention call launches, with tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import HIP, REGISTERS, Launch, aligned, cdiv, named_launch, power_of_2


class Tile(NamedTuple):
    """The tile of one program."""

    frames: int  # T, padded
    rows: int  # rows of scores per step
    width: int  # of a chunk of D
    chunks: int
    warps: int


MAX_DIM = 160
MAX_FRAMES = 128
# (bytes per element, padded frames) -> (maximum width of a chunk of D, warps of 32). Chunks bound
# the registers for any D and cost no memory traffic: repeated reads hit the L1 cache.
# tests/kernels/test_compiled.py compiles all that `tile` can return and checks for spills.
TABLE = {
    (2, 16): (64, 1), (2, 32): (64, 2), (2, 64): (64, 4), (2, 128): (32, 8),
    (4, 16): (32, 1), (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
}  # fmt: skip
CHUNK = {16: 32, 32: 32, 64: 32, 128: 16}  # padded frames -> the same for wider 16-bit heads
POSITIONS_FOR_BIAS = 16  # positions that one program sums into its part of the bias's gradient
# Where registers run out: fewer rows of scores at a time, and one launch per gradient.
ROWS = {(4, 64): 32, (4, 128): 16}  # default: all rows
ROWS_FOR_BIAS = 16
ONE_BY_ONE = {(4, 128)}


def tile(frames: int, dim: int, itemsize: int) -> Tile:
    """The launch configuration of a call."""
    padded = max(16, power_of_2(frames))  # 16: the smallest tl.dot
    width, warps = TABLE[itemsize, padded]
    if dim > width and itemsize == 2:
        width = CHUNK[padded]
    width = max(16, min(width, power_of_2(dim)))
    rows = min(padded, ROWS.get((itemsize, padded), padded))
    chunks = cdiv(dim, width)
    if rows < padded:  # a single chunk would stay in registers; a second, empty one loads nothing
        chunks = max(2, chunks)
    return Tile(padded, rows, width, chunks, warps)


def output(q: Tensor) -> Tensor:
    """The output buffer: q (B, T, S, H, D) -> (B, T, S, H*D), contiguous."""
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
    """(output, the launches that fill it); q, k, v are (B, T, S, H, D) with unit stride in D."""
    b, t, s, h, d = q.shape
    o = output(q)
    strides = (*_outer(q), *_outer(k), *_outer(v), *_outer(o.view(q.shape)))
    plan = tile(t, d, q.element_size())
    args = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": _padded(bias, plan), "o_ptr": o,
        "scale": scale, "T": t, "S": s, "H": h, **_named("qkvo", strides),
        **_constants(plan, d, strides, causal, precision(q.dtype, hip)),
    }  # fmt: skip
    fwd = _launch("fwd", b * s * h, plan.warps, args)
    return o, [fwd._replace(registers=REGISTERS) if plan.rows < plan.frames else fwd]


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float,
    into: Sequence[Tensor | None], needs_bias: bool, hip: bool = HIP,
) -> tuple[Tensor | None, list[Launch]]:  # fmt: skip
    """(parts of the bias's gradient, the launches that fill them and `into`, i.e. dq, dk and dv).

    Tensors of `into` share strides and may be None. The parts are (-1, H, T', T') float32 with
    T' >= T; their sum over the first axis is the gradient. g is (B, T, S, H, D) with unit stride
    in D.
    """
    b, t, s, h, d = q.shape
    plan = tile(t, d, q.element_size())
    like = next((x for x in into if x is not None), q)
    strides = (*_outer(q), *_outer(k), *_outer(v), *_outer(g), *_outer(like))
    common = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "g_ptr": g, "bias_ptr": _padded(bias, plan),
        "scale": scale, "T": t, "S": s, "H": h, **_named("qkvgd", strides),
        **_constants(plan, d, strides, causal, precision(q.dtype, hip)),
    }  # fmt: skip
    separate = [[x if i == j else None for j in range(3)] for i, x in enumerate(into)]
    launches = []
    for targets in separate if (q.element_size(), plan.frames) in ONE_BY_ONE else [into]:
        if any(x is not None for x in targets):
            outputs = dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), targets, strict=True))
            launches.append(_launch("bwd", b * s * h, plan.warps, common | outputs))
    if not needs_bias:
        return None, launches
    groups = b * cdiv(s, POSITIONS_FOR_BIAS)
    part = q.new_empty((groups, h, plan.frames, plan.frames), dtype=torch.float32)
    rows = min(plan.frames, ROWS_FOR_BIAS)
    common |= {"part_ptr": part, "POSITIONS": POSITIONS_FOR_BIAS, "ROWS": rows}
    programs = groups * h * (plan.frames // rows)
    dbias = _launch("dbias", programs, plan.warps, common)
    return part, [*launches, dbias._replace(registers=REGISTERS)]


def _launch(kernel: str, programs: int, warps: int, args: dict[str, Any]) -> Launch:
    from kernels.temporal_attention import triton  # lazy: Triton is optional

    return named_launch(triton, "temporal_attention", kernel, programs, warps, args)


def _padded(bias: Tensor | None, plan: Tile) -> Tensor | None:
    """(H, T, T) -> (H, T', T'), padded to full tiles so that threads load four elements at once."""
    if bias is None:
        return None
    more = plan.frames - bias.shape[-1]
    return F.pad(bias, (0, more, 0, more)) if more else bias.contiguous()


def _outer(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, frame, position and head; zero for axes of size one."""
    return tuple(st if n > 1 else 0 for n, st in zip(x.shape[:4], x.stride()[:4], strict=True))


def _named(tensors: str, strides: tuple[int, ...]) -> dict[str, int]:
    return dict(zip((f"{x}_{axis}" for x in tensors for axis in "btsh"), strides, strict=True))


def _constants(
    plan: Tile, dim: int, strides: tuple[int, ...], causal: bool, precision: str
) -> dict[str, Any]:
    return {
        "D": dim, "FRAMES": plan.frames, "ROWS": plan.rows, "WIDTH": plan.width,
        "CHUNKS": plan.chunks,
        "V": aligned((dim, *strides)), "CAUSAL": causal, "PRECISION": precision,
    }  # fmt: skip


def precision(dtype: torch.dtype, hip: bool = HIP) -> str:
    """input_precision of tl.dot: for float32, exact on AMD and three TF32 products on NVIDIA.

    Three TF32 products keep 22 of 24 bits and fit the registers of a warp; one keeps 11.
    """
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"
