"""Activation checkpointing (Chen et al. 2016, 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_checkpointed(
    on: bool, block: nn.Module, *args: Any, run: Callable[..., Any] | None = None
) -> Any:
    """block(*args), or its method `run`(*args); `on` recomputes activations in the backward pass.

    Outputs and gradients are unchanged, also with dropout and with frozen parameters.
    """
    f = run or block
    if not on or not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=has_dropout(block))


def has_dropout(block: nn.Module) -> bool:
    """Whether dropout is active in the block or in an adapter inside it.

    Only then must the generator state be saved for recomputation, which takes time.
    """
    return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in block.modules())
