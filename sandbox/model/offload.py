"""Frozen networks that wait on the CPU until they are needed (`trainer.low_vram`).

Their own weights never move: for the work copies on the device take their places and are let go of
afterwards, so that nothing is copied back and no number changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def frozen_in(part: nn.Module) -> list[nn.Module]:
    """`part` and what is in it, as far as it is frozen."""
    return [m for top in part.modules() if getattr(top, "_frozen", False) for m in top.modules()]


@contextmanager
def absent(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Without weights inside the block: what moves a whole system passes over them."""
    with _replaced(modules, lambda tensor: None):
        yield


@contextmanager
def present(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """With copies of all weights on `device` inside the block; one that has two names has one."""
    made: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            moved = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
        return made[id(tensor)]

    with _replaced(modules, copy):
        yield


@contextmanager
def _replaced(
    modules: Sequence[nn.Module], new: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    places = {id(own): own for m in modules for own in (m._parameters, m._buffers)}.values()
    kept = [(own, name, x) for own in places for name, x in own.items() if x is not None]
    try:
        for own, name, tensor in kept:
            own[name] = new(tensor)  # type: ignore[assignment]
        yield
    finally:
        for own, name, tensor in kept:
            own[name] = tensor  # type: ignore[assignment]
