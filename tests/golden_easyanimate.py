"""The recorded tensors of EasyAnimateV2; see tests/golden/easyanimate/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden/easyanimate"


def facts(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def recorded(name: str) -> dict[str, Tensor]:
    """Tensors of a fixture; those stored as float16 are exact there."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def stored_weights(name: str) -> dict[str, Tensor]:
    return {k.removeprefix("w."): v for k, v in recorded(name).items() if k.startswith("w.")}


def by_rule(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The README's weights for every parameter of `model`."""
    return {name: rule(name, tuple(p.shape), seed) for name, p in model.named_parameters()}


def rule(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    state = np.random.RandomState((crc32(name.encode()) + 7919 * seed) % 2**32)
    n = state.standard_normal(shape)
    if len(shape) == 1:
        n = 1 + 0.2 * n if name.endswith(".weight") else 0.1 * n
    else:
        n = n * 0.3 if name.endswith("scale_shift_table") else n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(n.astype(np.float16)).float()


def near(name: str, got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    """The fixtures' own limits; an independent implementation stayed below half of them."""
    error = ((got - want).norm() / want.norm()).item()
    largest = (got - want).abs().max().item()
    said = f"{name}: relative error {error:.1e}, largest {largest:.1e}"
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, want {tuple(want.shape)}"
    assert error <= tolerance, said
    assert largest <= 1e-5 * max(1.0, want.abs().max().item()), said
