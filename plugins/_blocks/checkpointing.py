"""Activations that are computed again in the backward pass (Chen et al. 2016, 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpointed(
    on: bool, block: nn.Module, *args: Any, run: Callable[..., Any] | None = None
) -> Any:
    """block(*args), or `run`(*args) of it; where `on`, its activations are made twice.

    Outputs and gradients are the same, also with dropout, and parameters may be frozen.
    """
    f = run or block
    if not on or not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=draws(block))


def draws(block: nn.Module) -> bool:
    """Whether it draws dropout now, that of an adapter included.

    The second pass must draw the same, and keeping the generators' states takes time.
    """
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in block.modules())
