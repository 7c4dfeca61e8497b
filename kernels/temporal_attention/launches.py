"""Which kernels of triton.py a call of temporal attention launches, with which tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._launch import HIP, REGISTERS, Launch, aligned, cdiv, power_of_2


class Tile(NamedTuple):
    """How a call is laid out: T padded to `frames`, of which `rows` are taken at a time, D in
    `chunks` of `width`, `warps` a program."""

    frames: int
    rows: int
    width: int
    chunks: int
    warps: int


MAX_DIM = 160
MAX_FRAMES = 128
# (bytes of an element, padded frames) -> (width of a chunk of D at most, warps of 32). Chunks bound
# the registers whatever D is, and cost no memory traffic: what is read again is in the first cache.
# tests/kernels/test_compiled.py compiles all that `tile` can return, and finds no spill.
TABLE = {
    (2, 16): (64, 1), (2, 32): (64, 2), (2, 64): (64, 4), (2, 128): (32, 8),
    (4, 16): (32, 1), (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
}  # fmt: skip
CHUNK = {16: 32, 32: 32, 64: 32, 128: 16}  # padded frames -> that of wider heads, in half precision
SITES_FOR_BIAS = 16  # places a program adds up before it writes its part of the bias's gradient
# Where registers run out, some rows of scores at a time, and a launch for each gradient.
ROWS = {(4, 64): 32, (4, 128): 16}  # all of them where the table has no number
ROWS_FOR_BIAS = 16
ONE_BY_ONE = {(4, 128)}


def tile(frames: int, dim: int, itemsize: int) -> Tile:
    """The launch configuration: the only place that picks one."""
    padded = max(16, power_of_2(frames))  # 16: the smallest tl.dot
    width, warps = TABLE[itemsize, padded]
    if dim > width and itemsize == 2:
        width = CHUNK[padded]
    width = max(16, min(width, power_of_2(dim)))
    rows = min(padded, ROWS.get((itemsize, padded), padded))
    chunks = cdiv(dim, width)
    if rows < padded:  # one alone would be held in registers; of a second, nothing is loaded
        chunks = max(2, chunks)
    return Tile(padded, rows, width, chunks, warps)


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
    into: tuple[Tensor | None, Tensor | None, Tensor | None], needs_bias: bool,
    hip: bool = HIP,
) -> tuple[Tensor | None, list[Launch]]:  # fmt: skip
    """(parts of the bias's gradient, the launches): fills `into`, which is dq, dk and dv.

    Each of these may be None, and their strides are equal. The parts are (-1, H, T', T') float32
    with T' >= T, to be added up. g is (B, T, S, H, D) with unit stride in D.
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
    apart = [tuple(x if i == j else None for j in range(3)) for i, x in enumerate(into)]
    wanted = apart if (q.element_size(), plan.frames) in ONE_BY_ONE else [into]
    launches = []
    for some in wanted:
        if any(x is not None for x in some):
            outputs = dict(zip(("dq_ptr", "dk_ptr", "dv_ptr"), some, strict=True))
            launches.append(_launch("bwd", b * s * h, plan.warps, common | outputs))
    if not needs_bias:
        return None, launches
    groups = b * cdiv(s, SITES_FOR_BIAS)
    part = q.new_empty((groups, h, plan.frames, plan.frames), dtype=torch.float32)
    rows = min(plan.frames, ROWS_FOR_BIAS)
    common |= {"part_ptr": part, "SITES": SITES_FOR_BIAS, "ROWS": rows}
    programs = groups * h * (plan.frames // rows)
    dbias = _launch("dbias", programs, plan.warps, common)
    return part, [*launches, dbias._replace(registers=REGISTERS)]


def _launch(name: str, programs: int, warps: int, args: dict[str, Any]) -> Launch:
    """With those of the arguments that the kernel has."""
    from kernels.temporal_attention import triton  # here: not every machine has the package

    kernel = getattr(triton, f"temporal_attention_{name}_kernel")
    return Launch(kernel, programs, {k: args[k] for k in kernel.arg_names}, warps)


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
        "D": dim, "FRAMES": plan.frames, "ROWS": plan.rows, "WIDTH": plan.width,
        "CHUNKS": plan.chunks,
        "V": aligned((dim, *strides)), "CAUSAL": causal, "PRECISION": precision,
    }  # fmt: skip


def precision(dtype: torch.dtype, hip: bool = HIP) -> str:
    """Of products of float32: exact where the matrix units have it, else three of TensorFloat-32.

    The three carry 22 bits of the 24, and need no more registers than a warp has; one alone would
    carry 11.
    """
    return "tf32x3" if dtype == torch.float32 and not hip else "ieee"
