"""Recorded steps and their weights, a slice of one table (tests/golden/<system>/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def recording(system: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a recording."""
    facts = json.loads((GOLDEN / system / f"{name}.json").read_text())
    return facts, load_file(GOLDEN / system / f"{name}.safetensors")


@cache
def table(system: str) -> Tensor:
    return load_file(GOLDEN / system / "weights_table.safetensors")["table"]


def filled(system: str, spec: dict[str, list]) -> dict[str, Tensor]:
    """{key: [shape, offset, scale, shift]} -> {key: weights}."""
    return {key: weight(system, entry) for key, entry in spec.items()}


def weight(system: str, spec: list) -> Tensor:
    """The weight of [shape, offset, scale, shift]."""
    shape, offset, scale, shift = spec
    values = table(system)
    index = (offset + torch.arange(torch.Size(shape).numel())) % len(values)
    return (values[index] * scale + shift).view(shape)
