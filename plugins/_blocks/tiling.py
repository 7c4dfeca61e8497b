"""Applying a network to overlapping tiles whose outputs are blended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Tiles along one axis."""

    size: int  # of an input tile
    step: int  # between the starts of two input tiles
    keep: int  # entries of an output tile that are kept
    blend: int  # entries of an output tile that are blended with the tile before


def apply_tiled(
    fn: Callable[[Tensor], Tensor], x: Tensor, size: int, out: int, overlap: float
) -> Tensor:
    """Applies `fn` to square tiles of x (..., H, W) of `size`, whose outputs have size `out`.

    Neighbouring tiles overlap by the share `overlap` of their size, where outputs are blended.
    """
    blend = round(out * overlap)
    tiles = Tiles(size, size - round(size * overlap), out - blend, blend)
    return apply_to_tiles(fn, x, tiles, tiles)


def apply_to_tiles(
    fn: Callable[[Tensor], Tensor], x: Tensor, rows: Tiles, columns: Tiles
) -> Tensor:
    """Applies `fn` to tiles of x (..., H, W) and blends the outputs linearly.

    As published: each tile is blended with the tile above, then with the tile on its left, both
    after their own blending.
    """
    above: list[Tensor] = []
    rows_out = []
    for top in range(0, x.shape[-2], rows.step):
        row: list[Tensor] = []
        for i, left in enumerate(range(0, x.shape[-1], columns.step)):
            tile = fn(x[..., top : top + rows.size, left : left + columns.size])
            if above:
                tile = blend(above[i], tile, rows.blend, -2)
            if row:
                tile = blend(row[-1], tile, columns.blend, -1)
            row.append(tile)
        rows_out.append(torch.cat([tile[..., : rows.keep, : columns.keep] for tile in row], -1))
        above = row
    return torch.cat(rows_out, -2)


def blend(before: Tensor, x: Tensor, extent: int, dim: int) -> Tensor:
    """Cross-fades the last `extent` entries of `before` along `dim` into the first ones of x."""
    extent = min(extent, before.shape[dim], x.shape[dim])
    ramp = torch.arange(extent, device=x.device, dtype=x.dtype) / extent
    ramp = ramp.view(-1, *[1] * (-dim - 1))
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    head = old * (1 - ramp) + x.narrow(dim, 0, extent) * ramp
    return torch.cat([head, x.narrow(dim, extent, x.shape[dim] - extent)], dim)
