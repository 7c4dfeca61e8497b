"""The causal 3-D autoencoder of Wan 2.1 (2503.20314, section 4.1), with the names of diffusers.

All tensors are (B, C, T, H, W). A clip may be processed in chunks: a `FrameCache` keeps what later
chunks need, so that the result does not depend on the chunks. The first frame of a clip has a
latent frame of its own, so that an image is a clip of one frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.autoencoder2d import per_frame
from sandbox.contracts import State

OFFICIAL = (  # patterns of the official names, and our names
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.", ".down_blocks."),
)

FrameCache = dict[nn.Module, Tensor]  # layer -> the last frames of its input


class CausalConv3d(nn.Conv3d):
    """Convolution over three frames that reads no later one, padded with zeros."""

    def __init__(self, in_channels: int, out_channels: int, space: int = 3) -> None:
        pad = space // 2
        super().__init__(in_channels, out_channels, (3, space, space), padding=(0, pad, pad))

    def forward(self, input: Tensor, cache: FrameCache | None = None) -> Tensor:
        before = None if cache is None else cache.get(self)
        x = F.pad(input, (0, 0, 0, 0, 2, 0)) if before is None else torch.cat((before, input), 2)
        if cache is not None:
            cache[self] = x[:, :, -2:].clone()  # a view would keep all of x in memory
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Divides each pixel by the RMS of its channels; `axes` follow the channels."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(wide, dim=1).to(x.dtype) * len(self.gamma) ** 0.5 * self.gamma


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a residual."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), CausalConv3d(channels, out)
        self.norm2, self.conv2 = ChannelNorm(out), CausalConv3d(out, out)
        self.conv_shortcut = nn.Identity() if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), cache)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)), cache)


class Attention(nn.Module):
    """Single-head attention over the pixels of a frame, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attend, x)

    def attend(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        qkv = rearrange(self.to_qkv(self.norm(x)), "n (p c) h w -> p n 1 (h w) c", p=3)
        out = F.scaled_dot_product_attention(*qkv)
        return self.proj(rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class MiddleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        first, second = self.resnets
        return second(self.attentions[0](first(x, cache)), cache)


class Down(nn.Module):
    """Halves the size in space, and with `in_time` the frames after the first."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, 2)
        )
        self.in_time = in_time
        if in_time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), (2, 1, 1))

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = per_frame(self.resample, x)
        if not self.in_time:
            return x
        before = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat((before, x), 2))
        if x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.time_conv(x)), 2)


class Up(nn.Module):
    """Doubles the size in space, and with `in_time` the frames after the first; halves channels."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.in_time = in_time
        if in_time:
            self.time_conv = CausalConv3d(channels, 2 * channels, space=1)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        if self.in_time:
            # As published: the first frame of a clip is no input of the convolution.
            first = x[:, :, : 0 if self in cache else 1]
            cache[self] = x.new_empty(0)
            rest = x[:, :, first.shape[2] :]
            if rest.shape[2]:
                pairs = self.time_conv(rest, cache)
                rest = rearrange(pairs, "b (r c) t h w -> b c (t r) h w", r=2)
            x = torch.cat((first, rest), 2)
        return per_frame(self.resample, x)


class Encoder(nn.Module):
    """A chunk (B, 3, T, H, W) -> mean and log-variance (B, 2C, t, h, w) before `quant_conv`."""

    def __init__(
        self, widths: Sequence[int], layers: int, in_time: Sequence[bool], channels: int
    ) -> None:
        super().__init__()
        width = widths[0]
        self.conv_in = CausalConv3d(3, width)
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            for _ in range(layers):
                self.down_blocks.append(ResidualBlock(width, out))
                width = out
            if i < len(in_time):
                self.down_blocks.append(Down(out, in_time[i]))
        self.mid_block = MiddleBlock(width)
        self.norm_out = ChannelNorm(width)
        self.conv_out = CausalConv3d(width, channels)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x, cache))), cache)


class UpBlock(nn.Module):
    """Residual blocks, then `Up` unless `in_time` is None."""

    def __init__(self, width: int, out: int, layers: int, in_time: bool | None) -> None:
        super().__init__()
        widths = [width, *[out] * (layers - 1)]
        self.resnets = nn.ModuleList(ResidualBlock(w, out) for w in widths)
        self.upsamplers = nn.ModuleList([] if in_time is None else [Up(out, in_time)])

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, cache)
        return x


class Decoder(nn.Module):
    """A chunk of latents after `post_quant_conv` (B, C, t, h, w) -> (B, 3, T, H, W).

    `widths` and `in_time` start at the lowest resolution.
    """

    def __init__(
        self, widths: Sequence[int], layers: int, in_time: Sequence[bool], channels: int
    ) -> None:
        super().__init__()
        width = widths[0]
        self.conv_in = CausalConv3d(channels, width)
        self.mid_block = MiddleBlock(width)
        self.up_blocks = nn.ModuleList()
        for out, twice in zip(widths, (*in_time, None), strict=True):
            self.up_blocks.append(UpBlock(width, out, layers, twice))
            width = out // 2
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, z: Tensor, cache: FrameCache) -> Tensor:
        x = self.mid_block(self.conv_in(z, cache), cache)
        for block in self.up_blocks:
            x = block(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


def from_official(state: State, layers: int) -> State:
    """Renames weights of the official repository; returns those with other names unchanged.

    `layers`: residual blocks per level of the decoder, which the official list does not group.
    """
    if "encoder.conv1.weight" not in state:
        return state

    def grouped(match: re.Match[str]) -> str:
        level, i = divmod(int(match[1]), layers + 1)
        return f".up_blocks.{level}." + (f"resnets.{i}." if i < layers else "upsamplers.0.")

    found = {}
    for name, weight in state.items():
        for pattern, new in OFFICIAL:
            name = re.sub(pattern, new, name)
        found[re.sub(r"\.upsamples\.(\d+)\.", grouped, name)] = weight
    return found
