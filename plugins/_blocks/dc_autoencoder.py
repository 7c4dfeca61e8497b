"""The deep-compression autoencoder (Chen et al. 2024, 2410.10733), with the names of diffusers.

All tensors are images (B, C, H, W). Every change of size has a shortcut without weights between
space and channels, so that the convolutions learn a residual (section 3.2, figure 4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sandbox.contracts import State

OFFICIAL = (  # patterns of the official names, and our names
    (r"\b(main|op_list)\.", ""),
    (r"\.project_in\.conv\.(weight|bias)$", r".conv_in.\1"),
    (r"\.project_out\.[02]\.conv\.(weight|bias)$", r".conv_out.\1"),
    (r"\bcontext_module\b", "attn"),
    (r"\blocal_module\b", "conv_out"),
    (r"\baggreg\.(\d+)\.0\.", r"to_qkv_multiscale.\1.proj_in."),
    (r"\baggreg\.(\d+)\.1\.", r"to_qkv_multiscale.\1.proj_out."),
    (r"\b(inverted|depth|point)_conv\.conv\.", r"conv_\1."),
    (r"\bproj\.conv\.", "to_out."),
    (r"\bproj\.norm\.", "norm_out."),
    (r"\b(conv\d?)\.conv\.", r"\1."),
    (r"\b(conv2|point_conv)\.norm\.", "norm."),
    (r"\.project_in\.", ".conv_in."),
    (r"\.project_out\.0\.", ".norm_out."),
    (r"\.project_out\.2\.", ".conv_out."),
    (r"^encoder\.stages\.", "encoder.down_blocks."),
    (r"^decoder\.stages\.", "decoder.up_blocks."),
)
EPS = 1e-5  # of every norm, as published
ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}
FACTOR = 2  # by which a level changes the size


class Level(Protocol):
    """Settings of the blocks of one level."""

    block: str
    width: int
    layers: int
    scale: int
    norm: str
    act: str


class ChannelNorm(nn.Module):
    """RMSNorm over the channels of each pixel, with a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).to(self.weight.dtype)
        return (F.rms_norm(x, x.shape[-1:], self.weight, EPS) + self.bias).movedim(-1, 1)


def norm_of(kind: str, channels: int) -> nn.Module:
    return ChannelNorm(channels) if kind == "rms_norm" else nn.BatchNorm2d(channels, EPS)


class ResBlock(nn.Module):
    """x + norm(convolution(activation(convolution(x))))."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(level.width, level.width, 3, padding=1)
        self.act = ACTIVATIONS[level.act]()
        self.conv2 = nn.Conv2d(level.width, level.width, 3, padding=1, bias=False)
        self.norm = norm_of(level.norm, level.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class ScaleProjection(nn.Module):
    """Queries, keys and values of blocks of pixels: depthwise, then grouped convolution."""

    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x))


class LinearAttention(nn.Module):
    """Attention with ReLU features at one or two scales (EfficientViT, 2205.14756, section 3.1).

    Its cost is linear in the number of pixels. Images of at most head_dim pixels use the equal
    quadratic form, as published.
    """

    def __init__(self, level: Level, head_dim: int) -> None:
        super().__init__()
        heads = level.width // head_dim
        inner, scales = heads * head_dim, 2 if level.scale else 1
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(level.width, inner, bias=False) for _ in range(3)
        )
        self.to_qkv_multiscale = nn.ModuleList(
            ScaleProjection(3 * inner, 3 * heads, level.scale) for _ in range(scales - 1)
        )
        self.to_out = nn.Linear(scales * inner, level.width, bias=False)
        self.norm_out = norm_of(level.norm, level.width)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.movedim(1, -1)
        qkv = torch.cat([to(pixels) for to in (self.to_q, self.to_k, self.to_v)], -1).movedim(-1, 1)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1)
        # As published: heads split the concatenated channels, so that the queries of a head are not
        # those of to_q.
        q, k, v = rearrange(qkv, "b (n p d) h w -> p b n d (h w)", p=3, d=self.head_dim)
        out = self.attend(F.relu(q), F.relu(k), v).to(x.dtype)
        out = self.to_out(rearrange(out, "b n d (h w) -> b h w (n d)", h=x.shape[2]))
        return x + self.norm_out(out.movedim(-1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v (B, heads, d, pixels) -> (B, heads, d, pixels), float32."""
        eps = 1e-15
        with torch.autocast(q.device.type, enabled=False):  # sums of all pixels need float32
            q, k, v = (
                part.to(torch.promote_types(part.dtype, torch.float32)) for part in (q, k, v)
            )
            if q.shape[-1] <= self.head_dim:
                scores = k.mT @ q
                return v @ (scores / (scores.sum(2, keepdim=True) + eps))
            ones = v.new_ones(*v.shape[:2], 1, v.shape[-1])
            sums = torch.cat((v, ones), 2) @ k.mT @ q
            return sums[:, :, :-1] / (sums[:, :, -1:] + eps)


class GatedConvolution(nn.Module):
    """Feed-forward layer with a depthwise convolution and a gate, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width
        self.conv_inverted = nn.Conv2d(width, hidden, 1)
        self.conv_depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv_point = nn.Conv2d(hidden // 2, width, 1, bias=False)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return x + self.norm(self.conv_point(value * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    """Linear attention and a gated convolution."""

    def __init__(self, level: Level, head_dim: int) -> None:
        super().__init__()
        self.attn = LinearAttention(level, head_dim)
        self.conv_out = GatedConvolution(level.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class Down(nn.Module):
    """Halves the size: convolution (strided, or with space-to-channel), plus the shortcut.

    The shortcut moves 2x2 pixels to channels and averages groups of them.
    """

    def __init__(self, width: int, out: int, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle, self.shortcut, self.out = unshuffle, shortcut, out
        stride, own = (1, out // FACTOR**2) if unshuffle else (FACTOR, out)
        self.conv = nn.Conv2d(width, own, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = F.pixel_unshuffle(out, FACTOR) if self.unshuffle else out
        if not self.shortcut:
            return out
        return out + F.pixel_unshuffle(x, FACTOR).unflatten(1, (self.out, -1)).mean(2)


class Up(nn.Module):
    """Doubles the size: convolution (after nearest interpolation, or with channel-to-space), plus
    the shortcut, which repeats channels and moves them to 2x2 pixels.
    """

    def __init__(self, width: int, out: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate, self.shortcut = interpolate, shortcut
        self.repeats = out * FACTOR**2 // width
        own = out if interpolate else out * FACTOR**2
        self.conv = nn.Conv2d(width, own, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            out = self.conv(F.interpolate(x, scale_factor=FACTOR))
        else:
            out = F.pixel_shuffle(self.conv(x), FACTOR)
        if not self.shortcut:
            return out
        return out + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), FACTOR)


def blocks(level: Level, head_dim: int) -> list[nn.Module]:
    if level.block == "ResBlock":
        return [ResBlock(level) for _ in range(level.layers)]
    return [EfficientViTBlock(level, head_dim) for _ in range(level.layers)]


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, C, h, w); a first level without layers is one convolution."""

    def __init__(
        self, levels: Sequence[Level], z_channels: int, head_dim: int, unshuffle: bool
    ) -> None:
        super().__init__()
        first, second = levels[:2]
        self.conv_in: nn.Module = nn.Conv2d(3, first.width, 3, padding=1)
        if not first.layers:
            self.conv_in = Down(3, second.width, unshuffle, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for level, width in zip(levels, (*(x.width for x in levels[1:]), 0), strict=True):
            down = [Down(level.width, width, unshuffle)] if width and level.layers else []
            self.down_blocks.append(nn.Sequential(*blocks(level, head_dim), *down))
        self.conv_out = nn.Conv2d(levels[-1].width, z_channels, 3, padding=1)
        self.z_channels = z_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x) + x.unflatten(1, (self.z_channels, -1)).mean(2)


class Decoder(nn.Module):
    """(B, C, h, w) -> (B, 3, H, W); `levels` starts at the highest resolution."""

    def __init__(
        self, levels: Sequence[Level], z_channels: int, head_dim: int, interpolate: bool
    ) -> None:
        super().__init__()
        first, second, last = *levels[:2], levels[-1]
        self.conv_in = nn.Conv2d(z_channels, last.width, 3, padding=1)
        self.repeats = last.width // z_channels
        self.up_blocks = nn.ModuleList()
        for level, width in zip(levels, (*(x.width for x in levels[1:]), 0), strict=True):
            up = [Up(width, level.width, interpolate)] if width and level.layers else []
            self.up_blocks.append(nn.Sequential(*up, *blocks(level, head_dim)))
        width = first.width if first.layers else second.width
        self.norm_out = ChannelNorm(width)
        self.conv_out: nn.Module = nn.Conv2d(width, 3, 3, padding=1)
        if not first.layers:
            self.conv_out = Up(width, 3, interpolate, shortcut=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z) + z.repeat_interleave(self.repeats, 1)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(F.relu(self.norm_out(x)))


def from_official(state: State) -> State:
    """Weights of the official repository under our names; returns those with other names unchanged.

    Linear layers are 1x1 convolutions there, and queries, keys and values one layer.
    """
    if not any(name.startswith("encoder.stages.") for name in state):
        return state
    found = {}
    for name, weight in state.items():
        for pattern, new in OFFICIAL:
            name = re.sub(pattern, new, name)
        front, is_qkv, _ = name.partition("qkv.conv.weight")
        if is_qkv:
            for part, rows in zip("qkv", weight.flatten(1).chunk(3), strict=True):
                found[f"{front}to_{part}.weight"] = rows
        else:
            found[name] = weight.flatten(1) if name.endswith("to_out.weight") else weight
    return found
