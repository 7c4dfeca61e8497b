"""The GPU benchmark of CogVideoX runs at tiny size, and both sides train as many parameters."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_cogvideox import ROWS, measure, ours, theirs, wired

pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.mark.parametrize("recipe", ROWS)
def test_both_sides_train_the_same_number_of_parameters(recipe) -> None:
    wiring = wired(f"{recipe}_tiny")
    found = [measure(make, wiring, torch.float32, "cpu", 1) for make in (ours, theirs)]
    assert found[0]["trained"] == found[1]["trained"] > 0
