"""3-D autoencoder of EasyAnimate's MagViT and Slice VAEs, with its published parameter names.

All tensors are (B, C, T, H, W). In a causal one (MagViT) a convolution sees no later frame, but
group norm and the attention of the middle see the whole clip: the network as a whole is not
strictly causal (as published). `causal=False` (Slice) looks one frame ahead and one back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import group_norm
from plugins._blocks.conv3d import Conv3d

EPS = 1e-6  # of every group norm, as published


class CausalConv3d(Conv3d):
    """Convolution with kernel 3, padded in time by two copies of the first frame, in front.

    causal=False: by a frame of zeros on either side instead. Space is padded by zeros: one on each
    side, or with stride 2 one at the right and bottom. T frames become ceil(T / time stride).
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

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[2] == 2:
            x = F.pad(x, (0, 1, 0, 1))
        if not self.causal:
            return super().forward(x)
        # Not F.pad(mode="replicate"): its backward on a GPU depends on the order of threads.
        x = torch.cat([x[:, :, :1], x[:, :, :1], x], 2)
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """Group norm with statistics over T, H and W together (or H and W, `per_frame`), then `act`."""

    def __init__(self, num_groups: int, num_channels: int, act: str = "none") -> None:
        super().__init__(num_groups, num_channels, EPS)
        self.act = act

    def forward(self, x: Tensor, per_frame: bool = False) -> Tensor:
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, act=self.act, per_frame=per_frame
        )


class ResidualBlock3D(nn.Module):
    """Twice norm, SiLU, convolution; added to the input (by 1x1x1 where channels change)."""

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
    """Divides time and space by `factors`, with one convolution."""

    def __init__(self, channels: int, factors: tuple[int, int], causal: bool = True) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, factors, causal)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    """Repeats pixels, convolves, interpolates frames: T become 2(T-1)+1, the first stays alone.

    causal=False: 2T, or a single frame that is `still` and stays one.
    """

    def __init__(self, channels: int, factors: tuple[int, int], causal: bool = True) -> None:
        super().__init__()
        self.time, self.space = factors
        self.conv = CausalConv3d(channels, channels, causal=causal)

    def forward(self, x: Tensor, still: bool = False) -> Tensor:
        x = x.repeat_interleave(self.space, 3).repeat_interleave(self.space, 4)  # (B, C, T, 2H, 2W)
        x = self.conv(x)
        if self.time == 1 or still:
            return x
        if not self.conv.causal:
            return double_frames(x)
        return torch.cat([x[:, :, :1], double_frames(x[:, :, 1:])], 2) if x.shape[2] > 1 else x


def double_frames(x: Tensor) -> Tensor:
    """Linear interpolation to (B, C, 2T, H, W): a frame becomes two, 1/4 before and after it."""
    before = torch.cat([x[:, :, :1], x[:, :, :-1]], 2)
    after = torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    pairs = torch.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], 3)
    return rearrange(pairs, "b c t two h w -> b c (t two) h w")


class Attention3D(nn.Module):
    """Self-attention with a residual, over the whole clip ("3d") or each frame ("spatial")."""

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
        tokens = rearrange(self.group_norm(x, spatial), f"b c t h w -> {sequence} c")
        q, k, v = (
            rearrange(to(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)")
        return x + rearrange(self.to_out(out), f"{sequence} c -> b c t h w", t=t, h=h, w=w)


class MidBlock3D(nn.Module):
    """Residual block, attention (where there is one), residual block."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        num_heads: int,
        attention: str | None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            ResidualBlock3D(channels, channels, num_groups, causal) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [Attention3D(channels, num_groups, num_heads, attention)] if attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.convs[1](x)


class DownBlock3D(nn.Module):
    """`layers` residual blocks, then a downsampler unless `factors` is None."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        num_groups: int,
        factors: tuple[int, int] | None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.convs = _residual_blocks(in_channels, out_channels, layers, num_groups, causal)
        self.downsampler = Downsampler(out_channels, factors, causal) if factors else None

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.downsampler(x) if self.downsampler else x


class UpBlock3D(nn.Module):
    """`layers` residual blocks, then an upsampler unless `factors` is None."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        num_groups: int,
        factors: tuple[int, int] | None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.convs = _residual_blocks(in_channels, out_channels, layers, num_groups, causal)
        self.upsampler = Upsampler(out_channels, factors, causal) if factors else None

    def forward(self, x: Tensor, still: bool = False) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.upsampler(x, still) if self.upsampler else x


def _residual_blocks(
    in_channels: int, out_channels: int, layers: int, num_groups: int, causal: bool
) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * layers
    return nn.ModuleList(ResidualBlock3D(a, b, num_groups, causal) for a, b in pairwise(widths))


class Encoder3D(nn.Module):
    """Pixels (B, 3, T, H, W) -> features (B, out_channels, t, h, w).

    `widths` are the channels of the levels, `factors` what each divides (time, space) by; the last
    level keeps the size.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        factors: tuple[tuple[int, int], ...],
        layers: int,
        out_channels: int,
        num_groups: int,
        num_heads: int,
        attention: str | None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        last = widths[-1]
        self.conv_in = CausalConv3d(3, widths[0], causal=causal)
        self.down_blocks = nn.ModuleList(
            DownBlock3D(a, b, layers, num_groups, f, causal)
            for a, b, f in zip((widths[0], *widths), widths, (*factors[:-1], None), strict=False)
        )
        self.mid_block = MidBlock3D(last, num_groups, num_heads, attention, causal)
        self.conv_norm_out = GroupNorm(num_groups, last, act="silu")
        self.conv_out = CausalConv3d(last, out_channels, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder3D(nn.Module):
    """Latents (B, in_channels, t, h, w) -> pixels (B, 3, T, H, W).

    `widths` and `factors` are in the order of the decoder, from the smallest level; the last level
    keeps the size.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        factors: tuple[tuple[int, int], ...],
        layers: int,
        in_channels: int,
        num_groups: int,
        num_heads: int,
        attention: str | None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, widths[0], causal=causal)
        self.mid_block = MidBlock3D(widths[0], num_groups, num_heads, attention, causal)
        self.up_blocks = nn.ModuleList(
            UpBlock3D(a, b, layers, num_groups, f, causal)
            for a, b, f in zip((widths[0], *widths), widths, (*factors[:-1], None), strict=False)
        )
        self.conv_norm_out = GroupNorm(num_groups, widths[-1], act="silu")
        self.conv_out = CausalConv3d(widths[-1], 3, causal=causal)

    def forward(self, z: Tensor) -> Tensor:
        return self.draw(self.features(z))

    def features(self, z: Tensor) -> Tensor:
        """Latents -> what the middle makes of them, (B, widths[0], t, h, w)."""
        return self.mid_block(self.conv_in(z))

    def draw(self, x: Tensor, still: bool = False) -> Tensor:
        """Features -> pixels; `still`: a single frame of a network that is not causal stays one."""
        for block in self.up_blocks:
            x = block(x, still)
        return self.conv_out(self.conv_norm_out(x))


@dataclass(frozen=True)
class Tiles:
    """Tiles along one axis: how long, how far apart, and of their outputs what is kept, blended."""

    size: int
    step: int
    keep: int
    blend: int


def tiled(fn: Callable[[Tensor], Tensor], x: Tensor, size: int, out: int, overlap: float) -> Tensor:
    """`fn` on square tiles of x (..., H, W), `size` wide, whose outputs are `out` wide.

    Neighbours share the part `overlap` of their width, where their outputs are blended.
    """
    blend = round(out * overlap)
    tiles = Tiles(size, size - round(size * overlap), out - blend, blend)
    return in_tiles(fn, x, tiles, tiles)


def in_tiles(fn: Callable[[Tensor], Tensor], x: Tensor, rows: Tiles, columns: Tiles) -> Tensor:
    """`fn` on tiles of x (..., H, W), whose outputs are blended linearly.

    As published: a tile is blended with the one above, then with the one at its left, both of which
    were blended before.
    """
    above: list[Tensor] = []
    whole = []
    for top in range(0, x.shape[-2], rows.step):
        row: list[Tensor] = []
        for i, left in enumerate(range(0, x.shape[-1], columns.step)):
            tile = fn(x[..., top : top + rows.size, left : left + columns.size])
            if above:
                tile = blended(above[i], tile, rows.blend, -2)
            if row:
                tile = blended(row[-1], tile, columns.blend, -1)
            row.append(tile)
        whole.append(torch.cat([tile[..., : rows.keep, : columns.keep] for tile in row], -1))
        above = row
    return torch.cat(whole, -2)


def blended(before: Tensor, x: Tensor, extent: int, dim: int) -> Tensor:
    """x, whose first `extent` entries along `dim` fade over from the last ones of `before`."""
    extent = min(extent, before.shape[dim], x.shape[dim])
    ramp = torch.arange(extent, device=x.device, dtype=x.dtype) / extent
    ramp = ramp.view(-1, *[1] * (-dim - 1))
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    head = old * (1 - ramp) + x.narrow(dim, 0, extent) * ramp
    return torch.cat([head, x.narrow(dim, extent, x.shape[dim] - extent)], dim)


# Brightness, red against green, both against blue; and the way back.
TO_COLOURS = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, -1 / 2, 0), (1 / 4, 1 / 4, -1 / 2))
FROM_COLOURS = ((1, 1, 2 / 3), (1, -1, 2 / 3), (1, 0, -4 / 3))
START_LOG_VARIANCE = -6.0  # little noise on the latents, which are about 1
COLOUR_ORDER = 0.01  # colour comes after brightness and before every change in time or space


@torch.no_grad()
def start_as_haar(encoder: Encoder3D, decoder: Decoder3D) -> None:
    """Makes an untrained pair a truncated Haar transform that is linear but for the group norms.

    Residual blocks start as the identity. A downsampler takes averages and differences within its
    cells and keeps the smoothest. A feature f ends as the pair of channels (f, -f), of which SiLU
    loses nothing: silu(f) - silu(-f) = f. So the first latents are the averages of brightness and
    colour, the next ones coarse changes. The decoder passes them on in such pairs and at first
    shows the averages alone. Other channels and the first convolutions of residual blocks keep
    their random weights. Needs two levels, 6 channels in each, and 3 latents.
    """
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, ResidualBlock3D):
            zero(module.conv2)
            if isinstance(module.shortcut, nn.Conv3d):
                pass_on(module.shortcut)
        elif isinstance(module, Attention3D):
            zero(module.to_out)
        elif isinstance(module, Upsampler):
            pass_on(module.conv)
    latents = decoder.conv_in.in_channels

    put(encoder.conv_in, torch.tensor(TO_COLOURS))
    orders = [0, COLOUR_ORDER, COLOUR_ORDER]  # how fast each feature changes
    *finer, last = (block.downsampler.conv for block in encoder.down_blocks if block.downsampler)
    for conv in finer:
        orders = keep_smoothest(conv, orders, conv.out_channels)
    orders = keep_smoothest(last, orders, min(latents, last.out_channels // 2), paired=True)
    zero(encoder.conv_out, rows=latents)
    put(encoder.conv_out, in_pairs(torch.eye(len(orders), latents)).mT)

    # Red, green, blue, brightness: channels alike, so that the last norm treats the colours alike.
    colours = torch.eye(3, latents)
    colours[:, :3] = torch.tensor(FROM_COLOURS)
    others = torch.eye(latents)[[i for i in range(latents) if i not in (1, 2)]]
    sources = torch.cat([colours, others])[: decoder.conv_in.out_channels // 2]
    zero(decoder.conv_in)
    put(decoder.conv_in, in_pairs(sources))
    put(decoder.conv_out, in_pairs(torch.eye(3)).mT)


@torch.no_grad()
def start_linear(
    encoder: Encoder3D, decoder: Decoder3D, quant_conv: nn.Conv3d, post_quant_conv: nn.Conv3d
) -> None:
    """`start_as_haar`, with latents that are almost free of noise."""
    start_as_haar(encoder, decoder)
    pass_on(post_quant_conv)
    z = post_quant_conv.in_channels
    variance = 0.1 * quant_conv.weight[z:]
    pass_on(quant_conv)
    quant_conv.weight[z:] = variance
    quant_conv.bias[z:] = START_LOG_VARIANCE


def keep_smoothest(
    conv: CausalConv3d, orders: list[float], room: int, paired: bool = False
) -> list[float]:
    """Makes a downsampler's first channels Haar functions of its cells, at most `room`.

    `orders` says how fast each incoming feature changes. A difference within these cells counts 1,
    one within the smaller cells before them twice as much. Returns the orders of what is kept, the
    lowest; `paired`: each is followed by its negative.
    """
    found = sorted(
        (2 * order + sum(differences), feature, differences)
        for feature, order in enumerate(orders)
        for differences in product(*map(range, conv.stride))
    )[:room]
    time, height, width = conv.stride
    taps = torch.zeros(len(found), *conv.weight.shape[1:])
    for row, (_, feature, differences) in zip(taps, found, strict=True):
        cell = row[feature, -time:, :height, :width]
        cell.fill_(1 / cell.numel())
        for axis, n in enumerate(cell.shape):
            if differences[axis]:
                cell.narrow(axis, n - 1, 1).neg_()
    rows = in_pairs(taps) if paired else taps
    zero(conv, len(rows))
    conv.weight[: len(rows)] = rows.to(conv.weight)
    return [order for order, _, _ in found]


def in_pairs(rows: Tensor) -> Tensor:
    """(N, ...) -> (2N, ...): each row and then its negative."""
    return torch.stack([rows, -rows], 1).flatten(0, 1)


def zero(layer: nn.Conv3d | nn.Linear, rows: int | None = None) -> None:
    """Zeros weight and bias of the first `rows` outputs, or of all."""
    layer.weight[:rows] = 0
    layer.bias[:rows] = 0


def put(conv: nn.Conv3d, matrix: Tensor) -> None:
    """Makes the first outputs `matrix` (out, in) times the first inputs at the same place."""
    outputs, inputs = matrix.shape
    middle = conv.kernel_size[-1] // 2
    now = -1 if getattr(conv, "causal", True) else 1  # the tap of this frame
    conv.weight[:outputs, :inputs] = 0
    conv.weight[:outputs, :inputs, now, middle, middle] = matrix.to(conv.weight)
    conv.bias[:outputs] = 0


def pass_on(conv: nn.Conv3d) -> None:
    """Makes a convolution the identity on channels that it has on both sides, zero elsewhere."""
    zero(conv)
    put(conv, torch.eye(min(conv.in_channels, conv.out_channels)))
