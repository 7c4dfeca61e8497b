"""Weights of recorded steps, filled from one table (see tests/golden/<system>/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def table(system: str) -> Tensor:
    return load_file(GOLDEN / system / "weights_table.safetensors")["table"]


def filled(system: str, spec: dict[str, list]) -> dict[str, Tensor]:
    """{key: [shape, offset, scale, shift]} -> {key: weights}."""
    values, state = table(system), {}
    for key, (shape, offset, scale, shift) in spec.items():
        index = (offset + torch.arange(torch.Size(shape).numel())) % len(values)
        state[key] = (values[index] * scale + shift).view(shape)
    return state
