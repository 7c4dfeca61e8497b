"""Intervals and tests for few seeds and many prompts; pure functions of numbers.

Seeds are few, so their mean gets Student's t. Prompts are many and their scores far from normal
(hits and misses), so they are resampled. What cannot be known is None: an interval of two seeds, a
test of differences that are all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SEEDS = 3  # for an interval by t
LEAST_PROMPTS = 100  # for one by resampling: below, it covers less than it says
RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the two-sided p-value of the mean being 0.

    `n`: seeds or prompts that it comes from, `of` says which.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    of: str = "seeds"
    p: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None


def of_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number a seed; Student's t, from 3 seeds on and where they differ at all."""
    from scipy.special import stdtr, stdtrit

    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    if n < LEAST_SEEDS or not math.isfinite(error) or error <= 1e-12 * abs(mean):
        return Estimate(mean, n=n)
    reach = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error))
    return Estimate(mean, mean - reach, mean + reach, n, p=p)


def of_prompts(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of one number a prompt; percentiles of resampled means, from 100 prompts on.

    The same numbers give the same interval. The p-value is twice the share of resampled means on
    the other side of 0, at least 2 / (resamples + 1).
    """
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    if n < LEAST_PROMPTS or not np.ptp(array) > 0:
        return Estimate(mean, n=n, of="prompts")
    means = resampled(array[None], seed)[0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return Estimate(mean, float(low), float(high), n, "prompts", p)


def resampled(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(S, N) -> (S, RESAMPLES) means of N values drawn from each row with replacement."""
    n = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return values @ (drawn.T / n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm 1979); None is no test and stays None."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        found[i] = highest
    return found
