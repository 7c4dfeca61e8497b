"""The GPU benchmark of CogVideoX runs, at tiny size: both sides train as many numbers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_cogvideox import ROWS, measured, ours, theirs, wired

pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.mark.parametrize("recipe", ROWS)
def test_both_sides_of_the_benchmark_train_the_same_number_of_weights(recipe) -> None:
    wiring = wired(f"{recipe}_tiny")
    found = [measured(make, wiring, torch.float32, "cpu", 1) for make in (ours, theirs)]
    assert found[0]["trained"] == found[1]["trained"] > 0
