"""The causal 3-D autoencoder of CogVideoX (Yang et al. 2024, 2408.06072), with its published names.

All tensors are (B, C, T, H, W). Long clips are processed in chunks: a `FrameCache` keeps the last
input frames of each convolution and puts them in front of the next chunk. Group norms cover one
chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import group_norm
from plugins._blocks.autoencoder2d import per_frame
from plugins._blocks.layers import GroupNorm

FrameCache = dict[nn.Module, Tensor]  # convolution -> the last two frames of its input
Factors = tuple[int, int]  # by which a level divides or multiplies time and space
EPS = 1e-6  # of every group norm, as published
LARGE = 2**31  # input size in bytes above which a convolution splits its input along time


class CausalConv3d(nn.Module):
    """Convolution of 3x3x3 or 1x1x1 that reads no later frame; zero-padded in space.

    Time is padded in front by two copies of the first frame, or by the cached frames of the
    previous chunk.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        space = kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, padding=(0, space, space))

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        if self.conv.kernel_size[0] == 1:
            return self.conv(x)
        before = cache.get(self)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat((before, x), 2)
        cache[self] = x[:, :, -2:].clone()  # a view would keep all of x in memory
        return conv_in_parts(self.conv, x)


def conv_in_parts(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x) for a kernel of 3 frames; splits a large x into parts that overlap by two frames."""
    parts = min(x.numel() * x.element_size() // LARGE + 1, x.shape[2] - 2)
    if parts < 2:
        return conv(x)
    starts = torch.arange(x.shape[2] - 2).chunk(parts)
    return torch.cat([conv(x[:, :, part[0] : part[-1] + 3]) for part in starts], 2)


class SpatialNorm(nn.Module):
    """Group norm with scale and shift computed from the latents at the same position, then SiLU."""

    def __init__(self, channels: int, z_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, EPS)
        self.conv_y = CausalConv3d(z_channels, channels, 1)
        self.conv_b = CausalConv3d(z_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        norm = self.norm_layer
        out = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        # The published order, resize then convolve, is the same function for 1x1x1.
        scale, shift = (resize_like(layer(z, {}), x) for layer in (self.conv_y, self.conv_b))
        return F.silu(out * scale + shift)


def resize_like(z: Tensor, x: Tensor) -> Tensor:
    """z repeated to the size of x; if T is odd, the first frame is resized separately."""
    frames, *space = x.shape[2:]
    if frames > 1 and frames % 2:
        first = F.interpolate(z[:, :, :1], (1, *space))
        return torch.cat((first, F.interpolate(z[:, :, 1:], (frames - 1, *space))), 2)
    return F.interpolate(z, (frames, *space))


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a residual; `z_channels`: norms are SpatialNorm."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, z_channels: int | None
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if z_channels is None:
                return GroupNorm(num_groups, channels, EPS, act="silu")
            return SpatialNorm(channels, z_channels, num_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cache: FrameCache, z: Tensor | None = None) -> Tensor:
        latents = () if z is None else (z,)
        out = self.conv1(self.norm1(x, *latents), cache)
        return self.conv_shortcut(x) + self.conv2(self.norm2(out, *latents), cache)


class Downsampler(nn.Module):
    """Averages pairs of frames (if T is odd, after the first), then a strided 2-D convolution."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.in_time = factors[0] == 2
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            odd = x.shape[2] % 2
            pairs = x[:, :, odd:].unflatten(2, (-1, 2)).mean(3)
            x = torch.cat((x[:, :, :1], pairs), 2) if odd else pairs
        return per_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsampler(nn.Module):
    """Repeats frames (if T is odd, after the first) and pixels, then a 2-D convolution."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.in_time = factors[0] == 2
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            odd = x.shape[2] % 2
            pairs = x[:, :, odd:].repeat_interleave(2, 2)
            x = torch.cat((x[:, :, :1], pairs), 2) if odd else pairs
        return per_frame(self.conv, x.repeat_interleave(2, 3).repeat_interleave(2, 4))


class Level(nn.Module):
    """Residual blocks, then a change of size (`resize`), if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        num_groups: int,
        z_channels: int | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(
            ResidualBlock(width, out_channels, num_groups, z_channels) for width in widths
        )

    def resize(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, cache: FrameCache, z: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, cache, z)
        return self.resize(x)


class DownLevel(Level):
    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, factors: Factors
    ) -> None:
        super().__init__(in_channels, out_channels, layers, groups)
        if factors != (1, 1):
            self.downsamplers = nn.ModuleList([Downsampler(out_channels, factors)])
        self.factors = factors

    def resize(self, x: Tensor) -> Tensor:
        return x if self.factors == (1, 1) else self.downsamplers[0](x)


class UpLevel(Level):
    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, z_channels: int,
        factors: Factors,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, layers, groups, z_channels)
        if factors != (1, 1):
            self.upsamplers = nn.ModuleList([Upsampler(out_channels, factors)])
        self.factors = factors

    def resize(self, x: Tensor) -> Tensor:
        return x if self.factors == (1, 1) else self.upsamplers[0](x)


class Encoder(nn.Module):
    """A chunk of a clip (B, 3, T, H, W) -> mean and log-variance (B, 2C, t, h, w)."""

    def __init__(
        self, widths: tuple[int, ...], factors: tuple[Factors, ...], layers: int, z_channels: int,
        num_groups: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = CausalConv3d(3, widths[0])
        self.down_blocks = nn.ModuleList(
            DownLevel(a, b, layers, num_groups, f)
            for a, b, f in zip((widths[0], *widths[:-1]), widths, factors, strict=True)
        )
        self.mid_block = Level(widths[-1], widths[-1], 2, num_groups)
        self.norm_out = GroupNorm(num_groups, widths[-1], EPS, act="silu")
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.conv_in(x, cache)
        for block in self.down_blocks:
            x = block(x, cache)
        x = self.mid_block(x, cache)
        return self.conv_out(self.norm_out(x), cache)


class Decoder(nn.Module):
    """A chunk of latents (B, C, t, h, w) -> (B, 3, T, H, W); smallest level first in `widths`."""

    def __init__(
        self, widths: tuple[int, ...], factors: tuple[Factors, ...], layers: int, z_channels: int,
        num_groups: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = CausalConv3d(z_channels, widths[0])
        self.mid_block = Level(widths[0], widths[0], 2, num_groups, z_channels)
        self.up_blocks = nn.ModuleList(
            UpLevel(a, b, layers, num_groups, z_channels, f)
            for a, b, f in zip((widths[0], *widths[:-1]), widths, factors, strict=True)
        )
        self.norm_out = SpatialNorm(widths[-1], z_channels, num_groups)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, z: Tensor, cache: FrameCache) -> Tensor:
        x = self.mid_block(self.conv_in(z, cache), cache, z)
        for block in self.up_blocks:
            x = block(x, cache, z)
        return self.conv_out(self.norm_out(x, z), cache)
