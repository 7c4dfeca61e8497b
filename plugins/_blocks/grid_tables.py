"""Rotary (RoPE) and sinusoidal position tables of space-time grids, as in CogVideoX.

Cells of a grid (T, H, W) are ordered frame by frame, row by row. Tables are cached per grid.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

Size = tuple[int, int]  # height, width
THETA = 10_000.0
T = TypeVar("T")


def cached(make: Callable[..., T]) -> Callable[..., T]:
    """Caches the tables that `make` returns.

    Under a fake tensor mode (task=plan) the cache belongs to that mode: fake tensors have no data
    and must not leave it.
    """
    real = lru_cache(maxsize=16)(make)

    @wraps(make)
    def table(*key: Any) -> T:
        mode = detect_fake_mode()
        if mode is None:
            return real(*key)
        fake = vars(mode).setdefault("tables", {})
        if (make, key) not in fake:
            fake[make, key] = make(*key)
        return fake[make, key]

    return table


def crop_region(grid: Size, base: Size) -> tuple[Size, Size]:
    """(top, left), (bottom, right) of the largest box of the grid's shape centred in `base`."""
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        box = base_height, round(base_height / height * width)
    else:
        box = round(base_width / width * height), base_width
    top, left = (round((b - s) / 2) for b, s in zip(base, box, strict=True))
    return (top, left), (top + box[0], left + box[1])


def fitted_positions(grid: Size, base: Size) -> tuple[Tensor, Tensor]:
    """Rows (H,) and columns (W,) of a grid stretched over its crop region in `base`, float32."""
    starts, stops = crop_region(grid, base)
    # As published: the last position is stop * (n - 1) / n, although the start may not be 0.
    rows, columns = (
        torch.linspace(start, stop * (n - 1) / n, n)
        for n, start, stop in zip(grid, starts, stops, strict=True)
    )
    return rows, columns


def counted_positions(grid: Size) -> tuple[Tensor, Tensor]:
    """Rows (H,) and columns (W,) counted from 0, float32."""
    height, width = grid
    return torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)


@cached
@torch.no_grad()
def rotary_table(
    frames: int, grid: Size, base: Size | None, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T * H * W, head_dim) float32; channels 2i and 2i + 1 share an angle.

    A quarter of the channels encodes the frame, 3/8 the row and 3/8 the column. `base`: size that
    the grid is stretched to (`fitted_positions`); None: `counted_positions`. `head_dim` is a
    multiple of 16.
    """
    with torch.device("cpu"):
        rows, columns = fitted_positions(grid, base) if base else counted_positions(grid)
        positions = torch.arange(frames, dtype=torch.float32), rows, columns
        sizes = head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8
        table = _axial_angles(positions, sizes)
    return table.cos().to(device), table.sin().to(device)


@cached
@torch.no_grad()
def even_rotary_table(
    frames: int, grid: Size, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T * H * W, head_dim) float32, of cells counted from 0, as in Wan.

    A third of the channel pairs, rounded down, encodes the row and a third the column; the rest
    encodes the frame. `head_dim` is even; channels 2i and 2i + 1 share an angle.
    """
    in_space = 2 * (head_dim // 6)
    with torch.device("cpu"):
        positions = [torch.arange(n, dtype=torch.float64) for n in (frames, *grid)]
        table = _axial_angles(positions, (head_dim - 2 * in_space, in_space, in_space))
    return table.cos().float().to(device), table.sin().float().to(device)


def _axial_angles(positions: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """(T * H * W, sum of sizes) of frames, rows and columns, in the dtype of their positions."""
    angles = [
        p[:, None] * THETA ** -(torch.arange(0, n, 2, dtype=p.dtype) / n)
        for p, n in zip(positions, sizes, strict=True)
    ]
    t, h, w = (len(p) for p in positions)
    shapes = (t, 1, 1, -1), (1, h, 1, -1), (1, 1, w, -1)
    axes = [a.view(s).expand(t, h, w, a.shape[1]) for a, s in zip(angles, shapes, strict=True)]
    return torch.cat(axes, -1).flatten(0, 2).repeat_interleave(2, -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (2i, 2i + 1) of x (..., N, heads, d) by their angles.

    In float32, or float64 for such x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack((-odd, even), -1).flatten(-2)
    return (wide * cos[:, None] + crossed * sin[:, None]).to(x.dtype)


def rotary_frames(
    first: int, count: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (count, head_dim) float32, of the frames from number `first` on.

    head_dim is even; channels 2i and 2i + 1 share an angle. Attention depends on the distance of
    two frames alone.
    """
    frames = torch.arange(first, first + count, dtype=torch.float64, device="cpu")
    channels = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    angles = (frames[:, None] * THETA ** -(channels / head_dim)).repeat_interleave(2, -1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def sinusoidal_table(
    frames: int, grid: Size, dim: int, scales: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """(T, H * W, dim) float64 on the default device: 1/4 time, 3/8 column, 3/8 row.

    Each part is sines, then cosines. Positions are divided by `scales` (time, space). `dim` is a
    multiple of 16.
    """
    height, width = grid
    in_time, in_space = scales
    time = _sinusoids(frames, dim // 4, in_time).view(frames, 1, 1, -1)
    column = _sinusoids(width, 3 * dim // 8, in_space).view(1, 1, width, -1)
    row = _sinusoids(height, 3 * dim // 8, in_space).view(1, height, 1, -1)
    parts = (x.expand(frames, height, width, -1) for x in (time, column, row))
    return torch.cat(tuple(parts), -1).flatten(1, 2)


def square_table(size: int, base: int, dim: int) -> Tensor:
    """(size * size, dim) float64: half the channels for columns, then rows, as in SD3.

    Positions run from 0 towards `base`, excluded. `dim` is a multiple of 4.
    """
    part = _sinusoids(size, dim // 2, size / base)
    columns, rows = part.expand(size, -1, -1), part[:, None].expand(-1, size, -1)
    return torch.cat((columns, rows), -1).flatten(0, 1)


@cached
@torch.no_grad()
def cached_sinusoidal_table(
    frames: int,
    grid: Size,
    dim: int,
    scales: tuple[float, float],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`sinusoidal_table`, on a device."""
    with torch.device("cpu"):
        return sinusoidal_table(frames, grid, dim, scales).to(device, dtype)


def _sinusoids(number: int, dim: int, scale: float) -> Tensor:
    """(number, dim) float64 of positions 0, 1, ... divided by `scale`."""
    positions = torch.arange(number, dtype=torch.float64) / scale
    steps = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * THETA**-steps
    return torch.cat((angles.sin(), angles.cos()), -1)
