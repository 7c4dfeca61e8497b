"""Embeddings of numbers and of grid positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(x: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) numbers -> (B, dim) float32: cosines, then sines, then a zero if `dim` is odd.

    The dim // 2 angular frequencies fall geometrically from 1 towards 1 / max_period. Float64
    numbers give float64.
    """
    half = dim // 2
    x = x if x.dtype == torch.float64 else x.float()
    steps = torch.arange(half, device=x.device, dtype=x.dtype)
    angles = x[:, None] * torch.exp(steps * (-math.log(max_period) / half))
    return _cos_sin(angles, dim)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """`sinusoids` in the order of operations of latent diffusion: (B,) -> (B, dim) float32.

    The two orders differ by 3e-5 in the angle at t = 999.
    """
    t = t if t.dtype == torch.float64 else t.float()
    steps = torch.arange(dim // 2, device=t.device, dtype=t.dtype)
    frequencies = torch.exp(-math.log(10_000) * steps / (dim // 2))
    return _cos_sin(t[:, None] * frequencies, dim)


def _cos_sin(angles: Tensor, dim: int) -> Tensor:
    """As published, an odd `dim` ends with a column of zeros."""
    both = torch.cat((angles.cos(), angles.sin()), -1)
    return nn.functional.pad(both, (0, 1)) if dim % 2 else both


class NumberEmbedding(nn.Module):
    """Embeds a number such as the diffusion time: (B,) -> (B, width)."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(sinusoids(x, self.num_features).to(dtype))


class GridPositions(nn.Module):
    """Learned positions of a grid of cells: the sum of one table per axis.

    `size` is the largest (frames, height, width); a smaller grid uses the first rows of each
    table. Tables start as N(0, std^2). The default 0.5 matches the scale of the tokens: with 0.02
    the default run needs two fifths more steps to learn the direction of motion.
    """

    def __init__(self, size: tuple[int, int, int], width: int, std: float = 0.5) -> None:
        super().__init__()
        self.t, self.h, self.w = (nn.Parameter(torch.randn(n, width) * std) for n in size)

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """Positions of a grid of this size: (frames, height * width, D)."""
        cells = self.h[:height, None] + self.w[:width]  # (h, w, D)
        return self.t[:frames, None] + cells.flatten(0, 1)
