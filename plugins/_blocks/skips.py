"""Long skips of a transformer, from early blocks to late ones as in a UNet.

Bao et al. 2023 (U-ViT, 2209.12152) concatenate and project. EasyAnimateV2 (2405.18991, section 3.2)
adds a projection that starts at zero, as here: a trained network is initially unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from plugins._blocks.layers import zero_module


def long_skips(depth: int, width: int) -> nn.ModuleList:
    """One linear layer per pair of blocks i and depth - 1 - i, in the order of use.

    As published: the one or two middle blocks have no partner; 28 blocks make 13 pairs, the first
    of which is 12 -> 15.
    """
    return nn.ModuleList(zero_module(nn.Linear(width, width)) for _ in range((depth - 1) // 2))


def apply_blocks(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    skips: nn.ModuleList | Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
) -> Tensor:
    """Runs x (..., D) through all blocks; the last `len(skips)` blocks get skips of the first."""
    kept, first = [], len(blocks) - len(skips)
    for i, block in enumerate(blocks):
        if i >= first:
            x = x + skips[i - first](kept.pop())
        x = block(x)
        if i < len(skips):
            kept.append(x)
    return x
