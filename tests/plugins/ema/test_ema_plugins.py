"""Settings of the EMA."""

import math

import pytest

from plugins.ema.warmup import Warmup


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_out_of_range_is_named(decay):
    assert [p.partition("=")[0] for p in Warmup.Config(decay=decay).problems()] == ["decay"]


def test_an_unknown_interval_is_named_with_the_choices():
    (problem,) = Warmup.Config(every="epoch").problems()
    assert problem == "every='epoch': want one of ['step', 'micro_batch']"
