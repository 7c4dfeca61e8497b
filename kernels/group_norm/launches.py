"""Selects the kernels of triton.py that a group norm call launches, with tiles and buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._launch import REGISTERS, Launch, aligned, cdiv, named_launch, power_of_2

# All launch configurations. tests/kernels/test_compiled.py compiles every one that the functions
# below can select.
RESIDENT = {2048: 4, 4096: 8, 8192: 8, 16384: 16, 32768: 16}  # group size -> warps
STREAM = (4096, 8)  # (elements of a group per step of `stats`, warps)
TILES = ((1, 1024), (2, 512), (4, 256), (8, 128), (16, 64), (32, 32))  # channels x positions
TILE_WARPS = 4
LAST_TILES = ((16, 128), (32, 64), (64, 32))  # the same for channels-last tensors
LAST_WARPS = 4
# Enough programs for any supported GPU. A constant rather than the GPU's own number: the order of
# additions, and with it the last bits, must not depend on the machine.
PROGRAMS = 1024
MIN_FUSED_GROUPS = 264  # with fewer groups, the backward pass takes two launches
MERGE_ROWS = 16  # parts per step of `merge`
FINISH = (32, 32)  # parts x channels per step of `finish`


class Inputs(NamedTuple):
    """The tensors of a call, as in `kernels.group_norm`."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    pre_shift: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


class Options(NamedTuple):
    """The other arguments of a call."""

    groups: int
    eps: float
    silu: bool
    frames: int
    per_frame: bool
    out_dtype: torch.dtype


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    x: bool
    weight: bool
    bias: bool
    pre_shift: bool
    scale: bool
    shift: bool


class Rows(NamedTuple):
    """Memory layout: row r starts at (r // inner) * outer + (r % inner) * step.

    Within a row, channel c of position s is at c * channel + s, or at c + s * position for
    channels-last tensors (`last`).
    """

    rows: int
    inner: int
    outer: int
    step: int
    channel: int
    position: int
    positions: int
    last: bool


def rows_of(shape: tuple[int, ...], stride: tuple[int, ...], per_frame: bool) -> Rows | None:
    """The rows of (N, C, *spatial), or of each of the T frames of (N, C, T, *spatial).

    None for layouts that are neither channels first nor channels last.
    """
    n, channels = shape[:2]
    inner = shape[2] if per_frame else 1
    step = stride[2] if per_frame and inner > 1 else 0
    outer = stride[0] if n > 1 else 0
    axes = tuple(zip(shape, stride, strict=True))[3 if per_frame else 2 :]
    spatial = [(size, st) for size, st in axes if size > 1]
    for (_, before), (size, after) in pairwise(spatial):
        if before != size * after:
            return None
    positions = prod(size for size, _ in spatial)
    position = spatial[-1][1] if spatial else 1
    channel = stride[1] if channels > 1 else positions
    if position == 1:
        return Rows(n * inner, inner, outer, step, channel, 1, positions, False)
    if channel == 1 or channels == 1:
        return Rows(n * inner, inner, outer, step, 1, position, positions, True)
    return None


layout = lru_cache(maxsize=4096)(rows_of)


def supported_layout(x: Tensor, per_frame: bool) -> Rows:
    """The layout of a tensor that `unsupported` in operator.py has accepted."""
    rows = layout(tuple(x.shape), x.stride(), per_frame)
    if rows is None:
        raise ValueError(f"group_norm: strides {x.stride()}: want channels first or channels last")
    return rows


def frames_as_rows(
    x: Tensor, frames: int, per_frame: bool, find: Callable[..., Rows | None] = rows_of
) -> tuple[int, bool]:
    """(frames, per_frame) for which `rows_of` accepts x, if there are any.

    A clip (N, C, T, *spatial) that is a view of frame-major images has no rows, but its frames
    have: it becomes T rows that share statistics.
    """
    if per_frame or frames > 1 or x.ndim < 4 or find(tuple(x.shape), x.stride(), False):
        return frames, per_frame
    has_rows = find(tuple(x.shape), x.stride(), True) is not None
    return (x.shape[2], True) if has_rows else (frames, per_frame)


def empty_like(x: Tensor, dtype: torch.dtype, per_frame: bool) -> Tensor:
    """An output buffer: channels last if x is, else contiguous. Also works on fake tensors."""
    rows = rows_of(tuple(x.shape), x.stride(), per_frame)
    if rows is None or not rows.last:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    n, c, *spatial = x.shape
    return x.new_empty((n, *spatial, c), dtype=dtype).movedim(-1, 1)


def tile(cpg: int, positions: int) -> tuple[int, int]:
    """The (channels, positions) of TILES that covers a group with the fewest idle lanes."""

    def cost(tile: tuple[int, int]) -> int:
        channels, run = tile
        return cdiv(cpg, channels) * cdiv(positions, run)

    return min(TILES, key=cost)


def last_tile(channels: int) -> tuple[int, int]:
    """The widest of LAST_TILES with at most half of its lanes idle."""
    return max((t for t in LAST_TILES if t[0] < 2 * channels), default=LAST_TILES[0])


def resident(size: int, frames: int, itemsize: int) -> tuple[int, int] | None:
    """(tile, warps) for a group of `size` elements that fits into registers, else None."""
    block = max(min(RESIDENT), power_of_2(size))
    if frames > 1 and itemsize == 4 and block == max(RESIDENT):
        return None  # the addresses of several frames leave too few registers
    return (block, RESIDENT[block]) if block in RESIDENT else None


def split(programs: int, blocks: int) -> tuple[int, int]:
    """(splits, blocks per split), so that `programs` * splits is about PROGRAMS."""
    splits = min(blocks, cdiv(PROGRAMS, programs))
    each = cdiv(blocks, splits)
    return cdiv(blocks, each), each


class Call(NamedTuple):
    """What all launches of a call share."""

    shape: Rows  # of x
    channels: int
    options: Options
    share: int  # rows of x per row of parameters
    parameters: dict[str, Any]

    @property
    def cpg(self) -> int:
        """Channels per group."""
        return self.channels // self.options.groups

    @property
    def statistics(self) -> int:
        return self.shape.rows // self.options.frames

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        """The stride arguments of each tensor, and V, the alignment that they share."""
        named: dict[str, int] = {"inner": self.shape.inner}
        numbers = [self.channels if self.shape.last else self.shape.positions]
        for name, tensor in tensors.items():
            rows = supported_layout(tensor, self.options.per_frame)
            named |= {f"{name}_outer": rows.outer, f"{name}_step": rows.step}
            named |= {f"{name}_channel": rows.channel, f"{name}_position": rows.position}
            numbers += [rows.outer, rows.step, rows.position if rows.last else rows.channel]
        named["V"] = aligned(tuple(numbers))
        return named


def call(inputs: Inputs, options: Options) -> Call:
    x = inputs.x
    extras = {"pre": inputs.pre_shift, "scale": inputs.scale, "shift": inputs.shift}
    extras = {k: _dense(p) for k, p in extras.items()}
    parameters = {
        "w_ptr": None if inputs.weight is None else inputs.weight.contiguous(),
        "b_ptr": None if inputs.bias is None else inputs.bias.contiguous(),
        **{f"{k}_ptr": p for k, p in extras.items()},
        **{f"{k}_row": 0 if p is None or len(p) == 1 else p.stride(0) for k, p in extras.items()},
    }
    shape = supported_layout(x, options.per_frame)
    share = shape.inner if options.per_frame else 1
    return Call(shape, x.shape[1], options, share, parameters)


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.stride(1) == 1 or p.shape[1] == 1 else p.contiguous()


def statistics(x: Tensor, groups: int, frames: int, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Buffers for mean and 1/std, both (statistics, groups) float32."""
    rows = x.shape[0] * (x.shape[2] if per_frame else 1) // frames
    mean, rstd = (x.new_empty((rows, groups), dtype=torch.float32) for _ in range(2))
    return mean, rstd


def _launch(kernel: str, programs: int, warps: int, args: dict[str, Any]) -> Launch:
    from kernels.group_norm import triton  # lazy: Triton is optional

    return named_launch(triton, "group_norm", kernel, programs, warps, args)


# --- forward --------------------------------------------------------------------------------------


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """(y, mean, 1/std, the launches that fill them); x has rows (see `rows_of`)."""
    x, a = inputs.x, call(inputs, options)
    groups, frames = options.groups, options.frames
    y = empty_like(x, options.out_dtype, options.per_frame)
    mean, rstd = statistics(x, groups, frames, options.per_frame)
    positions, last = a.shape.positions, a.shape.last
    common = {
        "x_ptr": x, "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, **a.parameters,
        "eps": options.eps, "C": a.channels, "G": groups, "S": positions, "share": a.share,
        "frames": frames, **a.strides(x=x, y=y), "CPG": a.cpg, "SILU": options.silu, "LAST": last,
    }  # fmt: skip
    fits = None if last else resident(frames * a.cpg * positions, frames, x.element_size())
    if fits is not None:
        block, warps = fits
        common |= {"FRAMES": frames, "BLOCK": block}
        return y, mean, rstd, [_launch("fwd", a.statistics * groups, warps, common)]
    launches = _last_forward(a, x, common) if last else _split_forward(a, x, common)
    return y, mean, rstd, launches


def _split_forward(a: Call, x: Tensor, common: dict[str, Any]) -> list[Launch]:
    rows, positions, groups, frames = (
        a.shape.rows, a.shape.positions, a.options.groups, a.options.frames
    )  # fmt: skip
    block, warps = STREAM
    pieces, each = split(rows * groups, cdiv(a.cpg * positions, block))
    parts = [
        x.new_empty((a.statistics, groups, frames * pieces), dtype=torch.float32) for _ in range(2)
    ]
    stats = common | {
        "mean_ptr": parts[0], "m2_ptr": parts[1], "splits": pieces, "blocks": each, "BLOCK": block,
    }  # fmt: skip
    channels, run = tile(a.cpg, positions)
    splits, blocks = split(rows * groups, cdiv(positions, run))
    apply = common | {
        "part_mean_ptr": parts[0], "part_m2_ptr": parts[1], "pieces": pieces,
        "length": each * block, "splits": splits, "blocks": blocks,
        "PIECES": power_of_2(frames * pieces), "CHANNELS": channels, "POSITIONS": run,
    }  # fmt: skip
    return [
        _launch("stats", rows * groups * pieces, warps, stats),
        _launch("apply", rows * groups * splits, TILE_WARPS, apply),
    ]


def _last_forward(a: Call, x: Tensor, common: dict[str, Any]) -> list[Launch]:
    rows = a.shape.rows
    channels, run = last_tile(a.channels)
    programs = rows * cdiv(a.channels, channels)
    splits, blocks = split(programs, cdiv(a.shape.positions, run))
    parts = [x.new_empty((rows, splits, a.channels), dtype=torch.float32) for _ in range(2)]
    common |= {
        "part_mean_ptr": parts[0], "part_m2_ptr": parts[1], "splits": splits, "blocks": blocks,
        "length": blocks * run, "CHANNELS": channels, "POSITIONS": run, "ROWS": MERGE_ROWS,
        "CPG_POWER": power_of_2(a.cpg), "pieces": 1, "PIECES": 1,
    }  # fmt: skip
    stats = common | {"mean_ptr": parts[0], "m2_ptr": parts[1]}
    apply = common | {"part_mean_ptr": None, "part_m2_ptr": None}
    return [
        _launch("last_stats", programs * splits, LAST_WARPS, stats),
        _launch("merge", a.statistics * a.options.groups, TILE_WARPS, common),
        _launch("apply", programs * splits, LAST_WARPS, apply),
    ]


# --- backward -------------------------------------------------------------------------------------


def backward(
    g: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor, options: Options, needs: Needs
) -> tuple[list[Tensor | None], list[Launch]]:
    """(gradients in the order of Needs, the launches that fill them), given the output gradient g.

    g has x's layout (see `match_layout`), and x is as in `forward`. One final launch computes all
    gradients except x's from per-channel sums, in an order that depends on the shapes alone.
    """
    x, a = inputs.x, call(inputs, options)
    dx = empty_like(x, x.dtype, options.per_frame) if needs.x or needs.pre_shift else None
    grads = [
        None if p is None or not needed else p.new_empty(p.shape)
        for p, needed in zip(inputs[1:], needs[1:], strict=True)
    ]
    groups, last = a.shape.rows * options.groups, a.shape.last
    fused = not last and options.frames == 1 and groups >= MIN_FUSED_GROUPS and dx is not None
    if last:
        (channels, run), warps = last_tile(a.channels), LAST_WARPS
        programs = a.shape.rows * cdiv(a.channels, channels)
    else:
        (channels, run), warps = tile(a.cpg, a.shape.positions), TILE_WARPS
        programs = groups
    blocks = cdiv(a.shape.positions, run)
    splits, each = (1, blocks) if fused else split(programs, blocks)
    common = {
        "x_ptr": x, "g_ptr": g, "dx_ptr": dx, "mean_ptr": mean, "rstd_ptr": rstd, **a.parameters,
        **_sum_buffers(a, x, needs, splits, has_parts=not (fused or last or dx is None)),
        "inverse": 1.0 / (options.frames * a.cpg * a.shape.positions), "C": a.channels,
        "G": options.groups, "S": a.shape.positions, "share": a.share, "frames": options.frames,
        "splits": splits, "blocks": each, "pieces": options.frames * splits,
        "PIECES": 1 if last else power_of_2(options.frames * splits),
        **a.strides(x=x, g=g, d=x if dx is None else dx),
        "CPG": a.cpg, "CHANNELS": channels, "POSITIONS": run, "SILU": options.silu, "LAST": last,
        "CPG_POWER": power_of_2(a.cpg), "ROWS": MERGE_ROWS,
    }  # fmt: skip
    if fused:
        launches = [_launch("bwd", programs, warps, common)]
    else:
        launches = [_launch("bwd_sums", programs * splits, warps, common)]
        if last and dx is not None:
            merged = a.statistics * options.groups
            launches += [_launch("bwd_merge", merged, TILE_WARPS, common)]
        if dx is not None:
            launches += [_launch("bwd_dx", programs * splits, warps, common)]
    if any(needs[1:]):
        launches.append(_finish(a, common, grads, splits))
    return [dx if needs.x else None, *grads], launches


def _sum_buffers(
    a: Call, x: Tensor, needs: Needs, splits: int, has_parts: bool
) -> dict[str, Tensor | None]:
    """float32 buffers for per-channel sums and per-group means, None where they are not needed."""

    def pair(first: str, second: str, size: tuple[int, ...], needed: bool) -> dict:
        make = (x.new_empty(size, dtype=torch.float32) if needed else None for _ in range(2))
        return dict(zip((first, second), make, strict=True))

    per_channel = (a.shape.rows, splits, a.channels)
    statistics = (a.statistics, a.options.groups)
    last = a.shape.last
    h = x.new_empty(per_channel, dtype=torch.float32) if needs.pre_shift else None
    return {
        **pair("a_ptr", "bq_ptr", per_channel, any(needs[1:]) or last), "h_ptr": h,
        **pair("c1_ptr", "c2_ptr", statistics, needs.pre_shift or last),
        **pair("part1_ptr", "part2_ptr", (*statistics, a.options.frames * splits), has_parts),
    }  # fmt: skip


def _finish(a: Call, common: dict[str, Any], grads: list[Tensor | None], splits: int) -> Launch:
    """The launch that computes the gradients of all inputs except x from the sums."""
    pieces, width = FINISH
    together = min(pieces, power_of_2(a.share * splits))
    names = ("dw_ptr", "db_ptr", "dpre_ptr", "dscale_ptr", "dshift_ptr")
    args = common | dict(zip(names, grads, strict=True))
    args |= {
        "N": a.shape.rows // a.share, "PIECES": together, "ROWS": pieces // together,
        "CHANNELS": width,
    }  # fmt: skip
    launch = _launch("finish", cdiv(a.channels, width), TILE_WARPS, args)
    return launch._replace(registers=REGISTERS)


def match_layout(g: Tensor, x: Tensor, per_frame: bool) -> Tensor:
    """g itself if it has x's order of axes, else a copy (for example of an expanded gradient)."""
    rows = layout(tuple(g.shape), g.stride(), per_frame)
    if rows is not None and rows.last == supported_layout(x, per_frame).last:
        return g
    return empty_like(x, g.dtype, per_frame).copy_(g)
