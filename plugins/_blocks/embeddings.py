"""Numbers and places as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) numbers -> (B, dim) float32: cosines, then sines.

    The dim / 2 angular frequencies fall geometrically from 1 towards 1 / max_period.
    """
    half = dim // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = x.float()[:, None] * torch.exp(steps * (-math.log(max_period) / half))
    return torch.cat((angles.cos(), angles.sin()), -1)


class NumberEmbedding(nn.Module):
    """A number such as a diffusion time: (B,) -> (B, width)."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(sinusoids(x, self.num_features).to(self.mlp[0].weight.dtype))


class GridPositions(nn.Module):
    """Learned positions of a grid of cells: one table for each axis, summed.

    `size` is the largest (frames, height, width); a smaller grid is its corner. The tables start
    as N(0, std^2), as large as the tokens that they are added to: with 0.02 the default run is
    two fifths later in learning which way a digit moves.
    """

    def __init__(self, size: tuple[int, int, int], width: int, std: float = 0.5) -> None:
        super().__init__()
        self.t, self.h, self.w = (nn.Parameter(torch.randn(n, width) * std) for n in size)

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """Of a grid of this size: (frames, height * width, D)."""
        places = self.h[:height, None] + self.w[:width]  # (h, w, D)
        return self.t[:frames, None] + places.flatten(0, 1)
