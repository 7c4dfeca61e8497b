"""3-D autoencoder of EasyAnimate's MagViT and Slice VAEs, with its published parameter names.

All tensors are (B, C, T, H, W). With causal=True (MagViT) convolutions do not read later frames. As
published, the network is not strictly causal: group norms and the attention of the middle block
cover the full clip. With causal=False (Slice) convolutions read one frame on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.conv3d import Conv3d
from plugins._blocks.layers import GroupNorm

Factors = tuple[int, int]  # by which a level divides or multiplies time and space


@dataclass(frozen=True)
class BlockSettings:
    """Settings that all blocks of a network share."""

    layers: int  # residual blocks per level
    num_groups: int
    num_heads: int
    attention: str | None  # of the middle block: "3d", "spatial" or None
    causal: bool


class CausalConv3d(Conv3d):
    """Convolution with kernel 3; T frames become ceil(T / time stride).

    Time is padded by two copies of the first frame in front; causal=False: by one frame of zeros on
    either side. Space is zero-padded by one on each side; stride 2: only at the right and bottom.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: tuple[int, int] = (1, 1),
        causal: bool = True,
    ) -> None:
        time, space = stride
        padding = (0 if causal else 1, 2 - space, 2 - space)
        super().__init__(in_channels, out_channels, 3, (time, space, space), padding)
        self.causal = causal

    def forward(self, input: Tensor) -> Tensor:
        x = F.pad(input, (0, 1, 0, 1)) if self.stride[2] == 2 else input
        if not self.causal:
            return super().forward(x)
        # Not F.pad(mode="replicate"): its backward on a GPU is not deterministic.
        x = torch.cat([x[:, :, :1], x[:, :, :1], x], 2)
        return super().forward(x)


class ResidualBlock3D(nn.Module):
    """Norm, SiLU, convolution, twice, and a residual (a 1x1x1 convolution if channels change)."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, causal: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels, act="silu")
        self.conv1 = CausalConv3d(in_channels, out_channels, causal=causal)
        self.norm2 = GroupNorm(num_groups, out_channels, act="silu")
        self.conv2 = CausalConv3d(out_channels, out_channels, causal=causal)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Downsampler(nn.Module):
    """Divides time and space by `factors` with a strided convolution."""

    def __init__(self, channels: int, factors: Factors, causal: bool = True) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, factors, causal)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    """Repeats pixels, convolves, and interpolates frames: T become 2(T-1)+1, keeping the first.

    causal=False: T become 2T; `single_frame` keeps T = 1.
    """

    def __init__(self, channels: int, factors: Factors, causal: bool = True) -> None:
        super().__init__()
        self.time, self.space = factors
        self.conv = CausalConv3d(channels, channels, causal=causal)

    def forward(self, x: Tensor, single_frame: bool = False) -> Tensor:
        x = x.repeat_interleave(self.space, 3).repeat_interleave(self.space, 4)  # (B, C, T, 2H, 2W)
        x = self.conv(x)
        if self.time == 1 or single_frame:
            return x
        if not self.conv.causal:
            return double_frames(x)
        return torch.cat([x[:, :, :1], double_frames(x[:, :, 1:])], 2) if x.shape[2] > 1 else x


def double_frames(x: Tensor) -> Tensor:
    """Linear interpolation to (B, C, 2T, H, W), at 1/4 frame before and after each frame."""
    before = torch.cat([x[:, :, :1], x[:, :, :-1]], 2)
    after = torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    pairs = torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], 3)
    return rearrange(pairs, "b c t two h w -> b c (t two) h w")


class Attention3D(nn.Module):
    """Self-attention with a residual, over the full clip ("3d") or each frame ("spatial")."""

    def __init__(self, channels: int, num_groups: int, num_heads: int, kind: str) -> None:
        super().__init__()
        self.num_heads, self.kind = num_heads, kind
        self.group_norm = GroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = x.shape[2:]
        spatial = self.kind == "spatial"
        sequence = "(b t) (h w)" if spatial else "b (t h w)"
        tokens = rearrange(self.group_norm(x, per_frame=spatial), f"b c t h w -> {sequence} c")
        q, k, v = (
            rearrange(to(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.to_out(out), f"{sequence} c -> b c t h w", t=t, h=h, w=w)


class MidBlock3D(nn.Module):
    """Residual block, optional attention, residual block."""

    def __init__(self, channels: int, s: BlockSettings) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            ResidualBlock3D(channels, channels, s.num_groups, s.causal) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [Attention3D(channels, s.num_groups, s.num_heads, s.attention)] if s.attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.convs[1](x)


class Level3D(nn.Module):
    """Residual blocks of one level."""

    def __init__(self, in_channels: int, out_channels: int, s: BlockSettings) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * s.layers
        self.convs = nn.ModuleList(
            ResidualBlock3D(a, b, s.num_groups, s.causal) for a, b in pairwise(widths)
        )


class DownBlock3D(Level3D):
    """Residual blocks, then a downsampler unless `factors` is None."""

    def __init__(
        self, in_channels: int, out_channels: int, factors: Factors | None, s: BlockSettings
    ) -> None:
        super().__init__(in_channels, out_channels, s)
        self.downsampler = Downsampler(out_channels, factors, s.causal) if factors else None

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.downsampler(x) if self.downsampler else x


class UpBlock3D(Level3D):
    """Residual blocks, then an upsampler unless `factors` is None."""

    def __init__(
        self, in_channels: int, out_channels: int, factors: Factors | None, s: BlockSettings
    ) -> None:
        super().__init__(in_channels, out_channels, s)
        self.upsampler = Upsampler(out_channels, factors, s.causal) if factors else None

    def forward(self, x: Tensor, single_frame: bool = False) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.upsampler(x, single_frame) if self.upsampler else x


class Encoder3D(nn.Module):
    """Pixels (B, 3, T, H, W) -> features (B, out_channels, t, h, w).

    `widths`: channels of the levels; `factors`: by which each divides (time, space). The last level
    keeps the size.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        factors: tuple[Factors, ...],
        out_channels: int,
        s: BlockSettings,
    ) -> None:
        super().__init__()
        last = widths[-1]
        self.conv_in = CausalConv3d(3, widths[0], causal=s.causal)
        self.down_blocks = nn.ModuleList(
            DownBlock3D(a, b, f, s)
            for a, b, f in zip((widths[0], *widths), widths, (*factors[:-1], None), strict=False)
        )
        self.mid_block = MidBlock3D(last, s)
        self.conv_norm_out = GroupNorm(s.num_groups, last, act="silu")
        self.conv_out = CausalConv3d(last, out_channels, causal=s.causal)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder3D(nn.Module):
    """Latents (B, in_channels, t, h, w) -> pixels (B, 3, T, H, W).

    `widths` and `factors` start at the smallest level; the last level keeps the size.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        factors: tuple[Factors, ...],
        in_channels: int,
        s: BlockSettings,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], causal=s.causal)
        self.mid_block = MidBlock3D(widths[0], s)
        self.up_blocks = nn.ModuleList(
            UpBlock3D(a, b, f, s)
            for a, b, f in zip((widths[0], *widths), widths, (*factors[:-1], None), strict=False)
        )
        self.conv_norm_out = GroupNorm(s.num_groups, widths[-1], act="silu")
        self.conv_out = CausalConv3d(widths[-1], 3, causal=s.causal)

    def forward(self, z: Tensor) -> Tensor:
        return self.upsample(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """Latents -> output of the middle block, (B, widths[0], t, h, w)."""
        return self.mid_block(self.conv_in(z))

    def upsample(self, x: Tensor, single_frame: bool = False) -> Tensor:
        """Features -> pixels; `single_frame`: see Upsampler."""
        for block in self.up_blocks:
            x = block(x, single_frame)
        return self.conv_out(self.conv_norm_out(x))
