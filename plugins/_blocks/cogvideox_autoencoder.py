"""The causal 3-D autoencoder of CogVideoX (Yang et al. 2024, 2408.06072), with its published names.

All tensors are (B, C, T, H, W). A long clip goes through in pieces; what a convolution saw last of
a piece is kept in a `Past` and stands before the next one. Group norms see one piece alone.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import group_norm
from plugins._blocks.autoencoder3d import EPS, GroupNorm

Past = dict[nn.Module, Tensor]  # convolution -> the last two frames of what it was given
Factors = tuple[int, int]  # what a level divides or multiplies time and space by
LARGE = 2**31  # bytes of an input, from which on a convolution takes it in parts along time


class CausalConv3d(nn.Module):
    """Convolution of 3x3x3 or 1x1x1 that sees no later frame; zeros around the picture.

    Before the first frame stand two copies of it, or the last two frames of the piece before.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        around = kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, padding=(0, around, around))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.conv.kernel_size[0] == 1:
            return self.conv(x)
        before = past.get(self)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat((before, x), 2)
        past[self] = x[:, :, -2:].clone()  # a view would keep all of x
        return in_parts(self.conv, x)


def in_parts(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x) for a kernel of 3 frames; a large x in parts that share two frames: the same."""
    parts = min(x.numel() * x.element_size() // LARGE + 1, x.shape[2] - 2)
    if parts < 2:
        return conv(x)
    starts = torch.arange(x.shape[2] - 2).chunk(parts)
    return torch.cat([conv(x[:, :, part[0] : part[-1] + 3]) for part in starts], 2)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift are the latents' at the same place, then SiLU."""

    def __init__(self, channels: int, z_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, channels, EPS)
        self.conv_y = CausalConv3d(z_channels, channels, 1)
        self.conv_b = CausalConv3d(z_channels, channels, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        norm = self.norm_layer
        out = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        # The published order is to enlarge z and then to convolve, which for 1x1x1 is the same.
        scale, shift = (enlarged(layer(z, {}), x) for layer in (self.conv_y, self.conv_b))
        return F.silu(out * scale + shift)


def enlarged(z: Tensor, x: Tensor) -> Tensor:
    """z repeated to the size of x; of an odd number of frames the first one stays alone."""
    frames, *space = x.shape[2:]
    if frames > 1 and frames % 2:
        first = F.interpolate(z[:, :, :1], (1, *space))
        return torch.cat((first, F.interpolate(z[:, :, 1:], (frames - 1, *space))), 2)
    return F.interpolate(z, (frames, *space))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, convolution, added to the input; with `z_channels` norms see z."""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, z_channels: int | None
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if z_channels is None:
                return GroupNorm(num_groups, channels, act="silu")
            return SpatialNorm(channels, z_channels, num_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, past: Past, z: Tensor | None = None) -> Tensor:
        told = () if z is None else (z,)
        out = self.conv1(self.norm1(x, *told), past)
        return self.conv_shortcut(x) + self.conv2(self.norm2(out, *told), past)


class Downsampler(nn.Module):
    """Means of pairs of frames (an odd first one stays alone), then each frame by a convolution."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.in_time = factors[0] == 2
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            alone = x.shape[2] % 2
            pairs = x[:, :, alone:].unflatten(2, (-1, 2)).mean(3)
            x = torch.cat((x[:, :, :1], pairs), 2) if alone else pairs
        return per_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsampler(nn.Module):
    """Repeats frames (an odd first or only one stays alone) and pixels, then convolves."""

    def __init__(self, channels: int, factors: Factors) -> None:
        super().__init__()
        self.in_time = factors[0] == 2
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_time and x.shape[2] > 1:
            alone = x.shape[2] % 2
            pairs = x[:, :, alone:].repeat_interleave(2, 2)
            x = torch.cat((x[:, :, :1], pairs), 2) if alone else pairs
        return per_frame(self.conv, x.repeat_interleave(2, 3).repeat_interleave(2, 4))


def per_frame(conv: nn.Conv2d, x: Tensor) -> Tensor:
    out = conv(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(out, "(b t) c h w -> b c t h w", b=x.shape[0])


class Level(nn.Module):
    """Residual blocks, then a change of size where there is one (`resize`)."""

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

    def forward(self, x: Tensor, past: Past, z: Tensor | None = None) -> Tensor:
        for block in self.resnets:
            x = block(x, past, z)
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
    """A piece of a clip (B, 3, T, H, W) -> mean and log-variance (B, 2C, t, h, w)."""

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
        self.norm_out = GroupNorm(num_groups, widths[-1], act="silu")
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(self.norm_out(x), past)


class Decoder(nn.Module):
    """A piece of latents (B, C, t, h, w) -> (B, 3, T, H, W); widths from the smallest level."""

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

    def forward(self, z: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.conv_in(z, past), past, z)
        for block in self.up_blocks:
            x = block(x, past, z)
        return self.conv_out(self.norm_out(x, z), past)
