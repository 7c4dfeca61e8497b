"""Small layers that several networks share; parameter names are the published ones."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import group_norm

M = TypeVar("M", bound=nn.Module)


def zero_module(layer: M) -> M:
    """Sets all parameters of `layer` to zero and returns it: its block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm and the activation `act` after it, fused by `kernels.group_norm`."""

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-6, act: str = "none"
    ) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.act = act

    def forward(
        self,
        input: Tensor,
        pre_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        frames: int = 1,
        per_frame: bool = False,
    ) -> Tensor:
        """act(norm(input + pre_shift) * (1 + scale) + shift); the last three are (N, C).

        Statistics are those of each sample: of `frames` consecutive ones together, or with
        `per_frame` of each frame of (N, C, T, H, W).
        """
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, act=self.act,
            pre_shift=pre_shift, scale=scale, shift=shift, frames=frames, per_frame=per_frame,
        )  # fmt: skip


class MLP(nn.Module):
    """Two linear layers with an activation between them: (..., features) -> (..., width)."""

    def __init__(self, features: int, width: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.act = act
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


class GELU(nn.Module):
    """Linear layer and tanh-approximated GELU: (..., D) -> (..., hidden)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class GEGLU(nn.Module):
    """Linear layer gated by a GELU (Shazeer 2020, 2002.05202): (..., D) -> (..., hidden)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class SwiGLU(nn.Module):
    """Linear layer gated by a SiLU (Shazeer 2020, 2002.05202): (..., D) -> (..., hidden)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.silu(gate)


class FeedForward(nn.Module):
    """Transformer MLP: (..., D) -> (..., D); the hidden width is 4 D where none is given."""

    def __init__(
        self,
        width: int,
        projection: type[GELU] | type[GEGLU] | type[SwiGLU],
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        # Identity takes the index of the published dropout, whose probability is 0.
        self.net = nn.Sequential(projection(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
