"""Long skips of a transformer: early blocks reach late ones, as in a UNet.

Bao et al. 2023 (U-ViT, 2209.12152) join and project; EasyAnimateV2 (2405.18991, section 3.2), as
here, adds a projection that starts at zero: a trained network is unchanged at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from plugins._blocks.unet import zeroed


def long_skips(depth: int, width: int) -> nn.ModuleList:
    """A layer for each pair of blocks i and depth - 1 - i, in the order of their use.

    The one or two blocks in the middle have no partner: 13 pairs of 28 blocks, 12 -> 15 first, as
    published.
    """
    return nn.ModuleList(zeroed(nn.Linear(width, width)) for _ in range((depth - 1) // 2))


def through(
    blocks: Sequence[Callable[[Tensor], Tensor]], skips: Sequence[nn.Module], x: Tensor
) -> Tensor:
    """x (..., D) through all blocks; the last ones see what the first ones made, if any `skips`."""
    kept, first = [], len(blocks) - len(skips)
    for i, block in enumerate(blocks):
        if i >= first:
            x = x + skips[i - first](kept.pop())
        x = block(x)
        if i < len(skips):
            kept.append(x)
    return x
