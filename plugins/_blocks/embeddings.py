"""Numbers and places as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) numbers -> (B, dim) float32: cosines, then sines, at dim / 2 angular frequencies from 1 down to 1 / max_period."""
    half = dim // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = x.float()[:, None] * torch.exp(steps * (-math.log(max_period) / half))
    return torch.cat((angles.cos(), angles.sin()), -1)


class NumberEmbedding(nn.Module):
    """A number such as a diffusion time, (B,) -> (B, width): sinusoids through two linear layers."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(sinusoids(x, self.num_features).to(self.mlp[0].weight.dtype))


class GridPositions(nn.Module):
    """Learned positions of a grid of up to (frames, height, width) cells: one table for each axis, summed."""

    def __init__(self, size: tuple[int, int, int], width: int, std: float = 0.02) -> None:
        super().__init__()
        self.t, self.h, self.w = (nn.Parameter(torch.randn(n, width) * std) for n in size)

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """(frames, height * width, D); a smaller grid is the corner of the largest one."""
        places = self.h[:height, None] + self.w[:width]  # (h, w, D)
        return self.t[:frames, None] + places.flatten(0, 1)
