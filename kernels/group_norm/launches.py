"""Which kernels of triton.py a call of group norm launches, with which tiles and buffers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._launch import REGISTERS, Launch, aligned, cdiv, power_of_2

# Every launch configuration, (tile, warps); tests/kernels/test_compiled.py compiles all that the
# functions below pick from here.
RESIDENT = {2048: 4, 4096: 8, 8192: 8, 16384: 16, 32768: 16}  # numbers of a group -> warps
STREAM = (4096, 8)  # numbers of a group that one step of `stats` reads
TILES = ((1, 1024), (2, 512), (4, 256), (8, 128), (16, 64), (32, 32))  # channels x places
TILE_WARPS = 4
LAST_TILES = ((16, 128), (32, 64), (64, 32))  # the same with channels side by side
LAST_WARPS = 4
# Programs that keep any of the GPUs busy. A constant, and not the GPU's own number: the order of
# additions, and with it the last bits, must not depend on where a run happens.
PROGRAMS = 1024
FEW = 264  # groups below which the backward pass is split in two launches
MERGE_ROWS = 16  # pieces that one step of `merge` reads
FINISH = (32, 32)  # pieces x channels that one step of `finish` reads


class Rows(NamedTuple):
    """Where the numbers of a tensor are: row r starts at (r // inner) * outer + (r % inner) * step.

    In a row, channel c of place s is at c * channel + s, or at c + s * place with channels `last`.
    """

    rows: int
    inner: int
    outer: int
    step: int
    channel: int
    place: int
    places: int
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
    places = prod(size for size, _ in spatial)
    place = spatial[-1][1] if spatial else 1
    channel = stride[1] if channels > 1 else places
    if place == 1:
        return Rows(n * inner, inner, outer, step, channel, 1, places, False)
    if channel == 1 or channels == 1:
        return Rows(n * inner, inner, outer, step, 1, place, places, True)
    return None


layout = lru_cache(maxsize=4096)(rows_of)


def over_time(
    x: Tensor, frames: int, per_frame: bool, find: Callable[..., Rows | None] = rows_of
) -> tuple[int, bool]:
    """(frames, per_frame) with which x has rows, if it can: see `rows_of`.

    A clip (N, C, T, *spatial) that is a view of frame-major pictures has no rows, but each of its
    frames has: then they are T rows that share their statistics.
    """
    if per_frame or frames > 1 or x.ndim < 4 or find(tuple(x.shape), x.stride(), False):
        return frames, per_frame
    apart = find(tuple(x.shape), x.stride(), True) is not None
    return (x.shape[2], True) if apart else (frames, per_frame)


def empty_like(x: Tensor, dtype: torch.dtype, per_frame: bool) -> Tensor:
    """A buffer for the result: channels last where x is, else contiguous. For fake tensors too."""
    rows = rows_of(tuple(x.shape), x.stride(), per_frame)
    if rows is None or not rows.last:
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    n, c, *spatial = x.shape
    return x.new_empty((n, *spatial, c), dtype=dtype).movedim(-1, 1)


def tile(cpg: int, places: int) -> tuple[int, int]:
    """The (channels, places) of TILES that covers a group with the fewest idle lanes."""

    def cost(tile: tuple[int, int]) -> int:
        channels, run = tile
        return cdiv(cpg, channels) * cdiv(places, run)

    return min(TILES, key=cost)


def last_tile(channels: int) -> tuple[int, int]:
    """The widest of LAST_TILES of which no more than half is idle."""
    return max((t for t in LAST_TILES if t[0] < 2 * channels), default=LAST_TILES[0])


def resident(numbers: int, frames: int, itemsize: int) -> tuple[int, int] | None:
    """(tile, warps) of a group that fits into registers; None where it does not."""
    size = max(min(RESIDENT), power_of_2(numbers))
    if frames > 1 and itemsize == 4 and size == max(RESIDENT):
        return None  # the addresses of several frames leave too few registers
    return (size, RESIDENT[size]) if size in RESIDENT else None


def split(programs: int, blocks: int) -> tuple[int, int]:
    """(pieces, blocks of each) of as many blocks, so that all pieces make PROGRAMS programs."""
    pieces = min(blocks, cdiv(PROGRAMS, programs))
    each = cdiv(blocks, pieces)
    return cdiv(blocks, each), each


class Call(NamedTuple):
    """What is the same in all launches of a call."""

    shape: Rows  # of x
    channels: int
    groups: int
    frames: int
    share: int  # rows of x that share a row of parameters
    parameters: dict[str, Any]
    per_frame: bool

    @property
    def cpg(self) -> int:
        return self.channels // self.groups

    @property
    def statistics(self) -> int:
        return self.shape.rows // self.frames

    def strides(self, **tensors: Tensor) -> dict[str, int]:
        """Arguments that say where the rows of each tensor are, and how well they are aligned."""
        named: dict[str, int] = {"inner": self.shape.inner}
        numbers = [self.channels if self.shape.last else self.shape.places]
        for name, tensor in tensors.items():
            rows = layout(tuple(tensor.shape), tensor.stride(), self.per_frame)
            named |= {f"{name}_outer": rows.outer, f"{name}_step": rows.step}
            named |= {f"{name}_channel": rows.channel, f"{name}_place": rows.place}
            numbers += [rows.outer, rows.step, rows.place if rows.last else rows.channel]
        named["V"] = aligned(tuple(numbers))
        return named


def call(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, pre_shift: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, frames: int, per_frame: bool,
) -> Call:  # fmt: skip
    extras = {"pre": pre_shift, "scale": scale, "shift": shift}
    extras = {k: _dense(p) for k, p in extras.items()}
    parameters = {
        "w_ptr": None if weight is None else weight.contiguous(),
        "b_ptr": None if bias is None else bias.contiguous(),
        **{f"{k}_ptr": p for k, p in extras.items()},
        **{f"{k}_row": 0 if p is None or len(p) == 1 else p.stride(0) for k, p in extras.items()},
    }
    shape = layout(tuple(x.shape), x.stride(), per_frame)
    share = shape.inner if per_frame else 1
    return Call(shape, x.shape[1], groups, frames, share, parameters, per_frame)


def _dense(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.stride(1) == 1 or p.shape[1] == 1 else p.contiguous()


def statistics(x: Tensor, groups: int, frames: int, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Buffers for mean and 1/sd: (statistics, groups) float32."""
    rows = x.shape[0] * (x.shape[2] if per_frame else 1) // frames
    return tuple(x.new_empty((rows, groups), dtype=torch.float32) for _ in range(2))


def _launch(name: str, programs: int, warps: int, **args: Any) -> Launch:
    """With those of the arguments that the kernel has."""
    from kernels.group_norm import triton  # here: not every machine has the package

    kernel = getattr(triton, f"group_norm_{name}_kernel")
    return Launch(kernel, programs, {k: args[k] for k in kernel.arg_names}, warps)


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *,
    silu: bool, pre_shift: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    frames: int, per_frame: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:  # fmt: skip
    """(y, mean, 1/sd, the launches that fill them); x has rows (see `rows_of`)."""
    a = call(x, groups, weight, bias, pre_shift, scale, shift, frames, per_frame)
    y = empty_like(x, out_dtype, per_frame)
    mean, rstd = statistics(x, groups, frames, per_frame)
    places, last = a.shape.places, a.shape.last
    common = {
        "x_ptr": x, "y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, **a.parameters,
        "eps": eps, "C": a.channels, "G": groups, "S": places, "share": a.share, "frames": frames,
        **a.strides(x=x, y=y), "CPG": a.cpg, "SILU": silu, "LAST": last,
    }  # fmt: skip
    fits = None if last else resident(frames * a.cpg * places, frames, x.element_size())
    if fits is not None:
        block, warps = fits
        common |= {"FRAMES": frames, "BLOCK": block}
        programs = a.statistics * groups
        return y, mean, rstd, [_launch("fwd", programs, warps, **common)]
    launches = _last_forward(a, x, common) if last else _split_forward(a, x, common)
    return y, mean, rstd, launches


def _split_forward(a: Call, x: Tensor, common: dict[str, Any]) -> list[Launch]:
    rows, places = a.shape.rows, a.shape.places
    block, warps = STREAM
    pieces, each = split(rows * a.groups, cdiv(a.cpg * places, block))
    parts = [
        x.new_empty((a.statistics, a.groups, a.frames * pieces), dtype=torch.float32)
        for _ in range(2)
    ]
    stats = common | {
        "mean_ptr": parts[0], "m2_ptr": parts[1], "splits": pieces, "blocks": each, "BLOCK": block,
    }  # fmt: skip
    channels, run = tile(a.cpg, places)
    splits, blocks = split(rows * a.groups, cdiv(places, run))
    apply = common | {
        "part_mean_ptr": parts[0], "part_m2_ptr": parts[1], "pieces": pieces,
        "length": each * block, "splits": splits, "blocks": blocks,
        "PIECES": power_of_2(a.frames * pieces), "CHANNELS": channels, "PLACES": run,
    }  # fmt: skip
    return [
        _launch("stats", rows * a.groups * pieces, warps, **stats),
        _launch("apply", rows * a.groups * splits, TILE_WARPS, **apply),
    ]


def _last_forward(a: Call, x: Tensor, common: dict[str, Any]) -> list[Launch]:
    rows, places = a.shape.rows, a.shape.places
    channels, run = last_tile(a.channels)
    programs = rows * cdiv(a.channels, channels)
    splits, blocks = split(programs, cdiv(places, run))
    parts = [x.new_empty((rows, splits, a.channels), dtype=torch.float32) for _ in range(2)]
    common |= {
        "part_mean_ptr": parts[0], "part_m2_ptr": parts[1], "splits": splits, "blocks": blocks,
        "length": blocks * run, "CHANNELS": channels, "PLACES": run, "ROWS": MERGE_ROWS,
        "CPG_POWER": power_of_2(a.cpg), "pieces": 1, "PIECES": 1,
    }  # fmt: skip
    stats = common | {"mean_ptr": parts[0], "m2_ptr": parts[1]}
    apply = common | {"part_mean_ptr": None, "part_m2_ptr": None}
    return [
        _launch("last_stats", programs * splits, LAST_WARPS, **stats),
        _launch("merge", a.statistics * a.groups, TILE_WARPS, **common),
        _launch("apply", programs * splits, LAST_WARPS, **apply),
    ]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool
    pre_shift: bool
    scale: bool
    shift: bool


def backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, groups: int, weight: Tensor | None,
    bias: Tensor | None, *, silu: bool, pre_shift: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, frames: int, per_frame: bool, needs: Needs,
) -> tuple[list[Tensor | None], list[Launch]]:  # fmt: skip
    """(gradients in the order of Needs, the launches that fill them), for g of the output.

    g is in x's layout (see `matching`), x as in `forward`. Gradients of all but x are written by
    one last launch from sums over each row and channel, in an order that shapes alone decide.
    """
    a = call(x, groups, weight, bias, pre_shift, scale, shift, frames, per_frame)
    rows, places, last = a.shape.rows, a.shape.places, a.shape.last
    dx = empty_like(x, x.dtype, per_frame) if needs.x or needs.pre_shift else None
    parameters = (weight, bias, pre_shift, scale, shift)
    grads = [
        p.new_empty(p.shape) if n else None for p, n in zip(parameters, needs[1:], strict=True)
    ]
    fused = not last and frames == 1 and rows * groups >= FEW and dx is not None
    if last:
        (channels, run), warps = last_tile(a.channels), LAST_WARPS
        programs = rows * cdiv(a.channels, channels)
    else:
        (channels, run), warps = tile(a.cpg, places), TILE_WARPS
        programs = rows * groups
    blocks = cdiv(places, run)
    splits, each = (1, blocks) if fused else split(programs, blocks)

    def buffer(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    per_channel = (rows, splits, a.channels)
    sums = any(needs[1:]) or last
    steps = (a.statistics, groups) if needs.pre_shift or last else None
    parts = None if fused or last or dx is None else (a.statistics, groups, frames * splits)
    common = {
        "x_ptr": x, "g_ptr": g, "dx_ptr": dx, "mean_ptr": mean, "rstd_ptr": rstd, **a.parameters,
        "a_ptr": buffer(*per_channel) if sums else None,
        "bq_ptr": buffer(*per_channel) if sums else None,
        "h_ptr": buffer(*per_channel) if needs.pre_shift else None,
        "c1_ptr": buffer(*steps) if steps else None, "c2_ptr": buffer(*steps) if steps else None,
        "part1_ptr": buffer(*parts) if parts else None,
        "part2_ptr": buffer(*parts) if parts else None,
        "inverse": 1.0 / (frames * a.cpg * places), "C": a.channels, "G": groups, "S": places,
        "share": a.share, "frames": frames, "splits": splits, "blocks": each,
        "pieces": frames * splits, "PIECES": 1 if last else power_of_2(frames * splits),
        **a.strides(x=x, g=g, d=x if dx is None else dx),
        "CPG": a.cpg, "CHANNELS": channels, "PLACES": run, "SILU": silu, "LAST": last,
        "CPG_POWER": power_of_2(a.cpg), "ROWS": MERGE_ROWS,
    }  # fmt: skip
    if fused:
        launches = [_launch("bwd", programs, warps, **common)]
    else:
        launches = [_launch("bwd_sums", programs * splits, warps, **common)]
        if last and dx is not None:
            merged = a.statistics * groups
            launches += [_launch("bwd_merge", merged, TILE_WARPS, **common)]
        if dx is not None:
            launches += [_launch("bwd_dx", programs * splits, warps, **common)]
    if any(needs[1:]):
        pieces, width = FINISH
        together = min(pieces, power_of_2(a.share * splits))
        finish = common | dict(
            zip(("dw_ptr", "db_ptr", "dpre_ptr", "dscale_ptr", "dshift_ptr"), grads, strict=True)
        )
        finish |= {
            "N": rows // a.share, "PIECES": together, "ROWS": pieces // together, "CHANNELS": width,
        }  # fmt: skip
        programs = cdiv(a.channels, width)
        last_one = _launch("finish", programs, TILE_WARPS, **finish)
        launches += [last_one._replace(registers=REGISTERS)]
    return [dx if needs.x else None, *grads], launches


def matching(g: Tensor, x: Tensor, per_frame: bool) -> Tensor:
    """g itself where it has x's order of axes, else a copy (of expanded gradients, say)."""
    rows = layout(tuple(g.shape), g.stride(), per_frame)
    if rows is not None and rows.last == layout(tuple(x.shape), x.stride(), per_frame).last:
        return g
    return empty_like(x, g.dtype, per_frame).copy_(g)
