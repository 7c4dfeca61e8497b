"""metric=brightness, with known answers."""

import pytest
import torch

from plugins.metric.brightness import Brightness


def grey(*levels: float) -> torch.Tensor:
    """Clips (N, 3, 2, 4, 4) of one grey each, levels in [0, 1]."""
    return (2 * torch.tensor(levels) - 1).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4)


def test_mean_and_spread_of_brightness_over_clips():
    metric = Brightness(Brightness.Config())
    found = metric.score(grey(*torch.linspace(0, 1, 101).tolist()), [""] * 101)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["brightness_spread"] == pytest.approx((1 / 12) ** 0.5, rel=0.02)  # uniform
    assert (found["dark"], found["bright"]) == pytest.approx((0.05, 0.95))
    assert found["brightness_range"] == pytest.approx(0.9)


def test_green_is_brighter_than_blue_and_values_are_clamped():
    metric = Brightness(Brightness.Config())
    green, blue = (torch.full((1, 3, 1, 2, 2), -1.0).index_fill(1, torch.tensor(i), 1.0)
                   for i in (1, 2))  # fmt: skip
    wild = torch.cat([green, blue, 9 * green.abs()])
    assert metric.each(wild, [""] * 3)["brightness"].tolist() == pytest.approx([0.7152, 0.0722, 1])
