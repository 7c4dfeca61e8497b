"""CPU offload of frozen modules (`trainer.low_vram`).

The CPU weights never move: copies on the device replace them while they are used and are freed
afterwards. So nothing is copied back and no number changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn


def freeze(module: Any) -> Any:
    """Marks a part as frozen: no gradients, always in eval mode, not in training checkpoints."""
    module._frozen = True
    return module.requires_grad_(False).eval()


def frozen_in(part: nn.Module) -> list[nn.Module]:
    """The frozen modules inside `part`, itself included."""
    return [m for top in part.modules() if getattr(top, "_frozen", False) for m in top.modules()]


def without_weights(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """The modules have no tensors inside the block, so that `.to(...)` of a parent skips them."""
    return _replaced(modules, lambda tensor: None)


def weights_on(device: torch.device, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """The modules have copies of their tensors on `device` inside the block; ties stay tied."""
    return _replaced(modules, cache(partial(_moved, device)))


def _moved(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on `device` without gradient; a parameter stays a parameter."""
    copy = tensor.detach().to(device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


@contextmanager
def _replaced(
    modules: Sequence[nn.Module], new: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    owners = {id(own): own for m in modules for own in (m._parameters, m._buffers)}.values()
    originals = [(own, name, x) for own in owners for name, x in own.items() if x is not None]
    try:
        for own, name, tensor in originals:
            own[name] = new(tensor)  # type: ignore[assignment]
        yield
    finally:
        for own, name, tensor in originals:
            own[name] = tensor  # type: ignore[assignment]
