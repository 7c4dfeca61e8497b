"""Haar initialisation of the 3-D autoencoders: before training they keep averages and changes."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from plugins._blocks.autoencoder3d import (
    Attention3D,
    CausalConv3d,
    Decoder3D,
    Downsampler,
    Encoder3D,
    ResidualBlock3D,
    Upsampler,
)

# Brightness, red - green, (red + green) - blue; and the inverse.
TO_COLOURS = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, -1 / 2, 0), (1 / 4, 1 / 4, -1 / 2))
FROM_COLOURS = ((1, 1, 2 / 3), (1, -1, 2 / 3), (1, 0, -4 / 3))
START_LOG_VARIANCE = -6.0  # little noise on latents of magnitude about 1
COLOUR_ORDER = 0.01  # ranks colour after brightness and before every change in time or space


@torch.no_grad()
def init_as_haar(encoder: Encoder3D, decoder: Decoder3D) -> None:
    """Initialises the pair as a truncated Haar transform, which is linear except for group norms.

    Residual blocks start as the identity. Each downsampler computes averages and differences within
    its cells and keeps the smoothest. Features end as pairs of channels (f, -f), from which SiLU
    loses no information: silu(f) - silu(-f) = f. The first latents are therefore averages of
    brightness and colour, the next ones coarse changes. The decoder passes them on as such pairs
    and initially outputs the averages. Other channels, and the first convolutions of residual
    blocks, keep their random weights. Needs two levels, 6 channels in each, and 3 latents.
    """
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, ResidualBlock3D):
            zero(module.conv2)
            if isinstance(module.shortcut, nn.Conv3d):
                set_identity(module.shortcut)
        elif isinstance(module, Attention3D):
            zero(module.to_out)
        elif isinstance(module, Upsampler):
            set_identity(module.conv)
    latents = decoder.conv_in.in_channels

    set_matrix(encoder.conv_in, torch.tensor(TO_COLOURS))
    orders: list[float] = [0, COLOUR_ORDER, COLOUR_ORDER]  # how fast each feature changes
    *finer, last = (m.conv for m in encoder.modules() if isinstance(m, Downsampler))
    for conv in finer:
        orders = keep_smoothest(conv, orders, conv.out_channels)
    orders = keep_smoothest(last, orders, min(latents, last.out_channels // 2), paired=True)
    zero(encoder.conv_out, rows=latents)
    set_matrix(encoder.conv_out, in_pairs(torch.eye(len(orders), latents)).mT)

    # Red, green, blue, brightness: equal magnitudes, so that the last norm scales colours equally.
    colours = torch.eye(3, latents)
    colours[:, :3] = torch.tensor(FROM_COLOURS)
    others = torch.eye(latents)[[i for i in range(latents) if i not in (1, 2)]]
    sources = torch.cat([colours, others])[: decoder.conv_in.out_channels // 2]
    zero(decoder.conv_in)
    set_matrix(decoder.conv_in, in_pairs(sources))
    set_matrix(decoder.conv_out, in_pairs(torch.eye(3)).mT)


@torch.no_grad()
def init_linear(
    encoder: Encoder3D, decoder: Decoder3D, quant_conv: nn.Conv3d, post_quant_conv: nn.Conv3d
) -> None:
    """`init_as_haar`, with almost noise-free latents."""
    init_as_haar(encoder, decoder)
    set_identity(post_quant_conv)
    z = post_quant_conv.in_channels
    variance = 0.1 * quant_conv.weight[z:]
    set_identity(quant_conv)
    quant_conv.weight[z:] = variance
    bias_of(quant_conv)[z:] = START_LOG_VARIANCE


def keep_smoothest(
    conv: CausalConv3d, orders: list[float], room: int, paired: bool = False
) -> list[float]:
    """Sets the first channels of a downsampler to at most `room` Haar functions of its cells.

    `orders` ranks the input features by how fast they change. Each difference within these cells
    counts 1, and one within the smaller cells of an earlier level counts twice as much. Keeps the
    lowest orders and returns them; `paired`: each channel is followed by its negative.
    """
    found = sorted(
        (2 * order + sum(differences), feature, differences)
        for feature, order in enumerate(orders)
        for differences in product(*(range(n) for n in conv.stride))
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
    """(N, ...) -> (2N, ...): each row followed by its negative."""
    return torch.stack([rows, -rows], 1).flatten(0, 1)


def bias_of(layer: nn.Conv3d | nn.Linear) -> Tensor:
    """The bias of a layer; raises ValueError for a layer without one."""
    if layer.bias is None:
        raise ValueError("the Haar initialisation needs layers with a bias")
    return layer.bias


def zero(layer: nn.Conv3d | nn.Linear, rows: int | None = None) -> None:
    """Zeros weight and bias of the first `rows` outputs, or of all."""
    layer.weight[:rows] = 0
    bias_of(layer)[:rows] = 0


def set_matrix(conv: nn.Conv3d, matrix: Tensor) -> None:
    """Makes the first outputs `matrix` (out, in) times the first inputs at the same position."""
    outputs, inputs = matrix.shape
    middle = conv.kernel_size[-1] // 2
    now = -1 if getattr(conv, "causal", True) else 1  # kernel index of the current frame
    conv.weight[:outputs, :inputs] = 0
    conv.weight[:outputs, :inputs, now, middle, middle] = matrix.to(conv.weight)
    bias_of(conv)[:outputs] = 0


def set_identity(conv: nn.Conv3d) -> None:
    """Makes a convolution the identity on the channels that both sides have, and zero elsewhere."""
    zero(conv)
    set_matrix(conv, torch.eye(min(conv.in_channels, conv.out_channels)))
