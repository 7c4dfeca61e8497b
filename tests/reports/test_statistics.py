"""Intervals cover what they say, by simulation and against scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from sandbox.reports import statistics
from sandbox.reports.statistics import holm, of_prompts, of_seeds

SIMULATIONS = 10_000


def test_the_interval_of_seeds_is_students():
    values = np.random.default_rng(0).normal(2, 3, 5)
    found = of_seeds(values.tolist())
    judge = scipy.stats.ttest_1samp(values, 0)
    interval = judge.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.p == pytest.approx(judge.pvalue, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_an_interval_of_few_seeds_holds_the_truth_95_times_in_100(seeds):
    drawn = np.random.default_rng(seeds).normal(0.3, 0.1, (SIMULATIONS, seeds))
    found = [of_seeds(row) for row in drawn.tolist()]
    assert 0.93 < np.mean([e.low <= 0.3 <= e.high for e in found]) < 0.97


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: (rng.random(shape) < 0.5) * 1.0,
        lambda rng, shape: (rng.random(shape) < 0.8) * 1.0,
        lambda rng, shape: rng.beta(2, 5, shape),
    ],
    ids=["half of them", "four of five", "skewed"],
)
def test_an_interval_of_100_prompts_holds_the_truth_95_times_in_100(draw, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    truth = draw(rng, 10**6).mean()
    # one weighing of resamples serves all rows, as in `of_prompts`
    means = statistics.resample(draw(rng, (SIMULATIONS, statistics.LEAST_PROMPTS)))
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert 0.93 < np.mean((low <= truth) & (truth <= high)) < 0.97


def test_few_seeds_or_prompts_and_equal_values_have_no_interval():
    assert not of_seeds([0.1, 0.9]).has_interval
    assert not of_prompts([0.0, 1.0] * 49).has_interval
    assert not of_seeds([0.5, 0.5, 0.5]).has_interval
    assert of_seeds([0.5, 0.5, 0.5]).mean == 0.5
    assert of_seeds([0.5, 0.5, 0.5]).p is None


def test_the_same_prompts_have_the_same_interval():
    values = np.random.default_rng(1).random(120)
    assert of_prompts(values) == of_prompts(values.tolist())


def test_a_difference_of_prompts_that_is_large_is_unlikely_by_chance():
    rng = np.random.default_rng(2)
    assert of_prompts(rng.normal(0.5, 1, 200)).p < 0.001
    assert of_prompts(rng.normal(0, 1, 200)).p > 0.05


def test_holm_multiplies_the_smallest_by_their_number_and_keeps_the_order():
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
