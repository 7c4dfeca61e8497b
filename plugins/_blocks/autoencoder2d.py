"""Encoder and decoder of the LDM autoencoders (Rombach et al. 2022, appendix G; after VQGAN).

Parameter names are the published ones. Both work on images (N, C, H, W); `per_frame` applies them
to video.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.layers import GroupNorm


class Sizes(Protocol):
    """The published hyper-parameters, as in the Configs of `kl` and `vq`."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    resolution: int  # image size that `attn_resolutions` refer to
    in_channels: int
    out_ch: int
    z_channels: int
    double_z: bool
    dropout: float
    num_groups: int  # 32 as published


def per_frame(f: Callable[[Tensor], Tensor], x: Tensor, limit: int | None = None) -> Tensor:
    """Applies `f` to each frame of (B, C, T, H, W), at most `limit` frames at once (None: all)."""
    frames = rearrange(x, "b c t h w -> (b t) c h w")
    out = torch.cat([f(part) for part in frames.split(limit)]) if limit else f(frames)
    return rearrange(out, "(b t) c h w -> b c t h w", b=x.shape[0])


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, channels, act="silu")
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, out_channels, act="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over the pixels of an image."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "n c h w -> n 1 (h w) c") for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # As published: zero padding on the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention if it is listed, and resampling if set."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self, s: Sizes, level: int, channels: int, blocks: int) -> None:
        super().__init__()
        out_channels = s.ch * s.ch_mult[level]
        widths = [channels, *[out_channels] * blocks]
        attends = s.resolution // 2**level in s.attn_resolutions
        self.block = nn.ModuleList(
            ResnetBlock(a, b, s.num_groups, s.dropout) for a, b in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, s.num_groups) for _ in range(blocks if attends else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class MidBlock(nn.Module):
    """Residual block, attention (independent of `attn_resolutions`), residual block."""

    def __init__(self, s: Sizes, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, s.num_groups, s.dropout)
        self.attn_1 = AttnBlock(channels, s.num_groups)
        self.block_2 = ResnetBlock(channels, channels, s.num_groups, s.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(s.in_channels, s.ch, 3, padding=1)
        widths = [s.ch, *(s.ch * m for m in s.ch_mult)]
        levels = [Level(s, i, widths[i], s.num_res_blocks) for i in range(len(s.ch_mult))]
        self.down = nn.ModuleList(levels)
        for level, width in zip(levels[:-1], widths[1:], strict=False):
            level.downsample = Downsample(width)
        self.mid = MidBlock(s, widths[-1])
        self.norm_out = GroupNorm(s.num_groups, widths[-1], act="silu")
        self.conv_out = nn.Conv2d(widths[-1], s.z_channels * (2 if s.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) in [-1, 1] -> (N, z_channels or twice that, H / f, W / f)."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        widths = [*(s.ch * m for m in s.ch_mult), s.ch * s.ch_mult[-1]]
        self.conv_in = nn.Conv2d(s.z_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(s, widths[-1])
        # up[0] has the highest resolution; `forward` runs from the last to the first.
        levels = [Level(s, i, widths[i + 1], s.num_res_blocks + 1) for i in range(len(s.ch_mult))]
        self.up = nn.ModuleList(levels)
        for level, width in zip(levels[1:], widths[1:], strict=False):
            level.upsample = Upsample(width)
        self.norm_out = GroupNorm(s.num_groups, widths[0], act="silu")
        self.conv_out = nn.Conv2d(widths[0], s.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, z_channels, H, W) -> (N, out_ch, f * H, f * W)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.norm_out(h))
