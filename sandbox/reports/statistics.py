"""Intervals and tests for few seeds and many prompts; pure functions of numbers.

Few seeds: Student's t (scipy). Many prompts, whose scores are far from normal (hits and misses):
resampled means. Unknown values are None, such as the interval of two seeds. Our own are only the
bootstrap, whose weights over prompts serve many rows at once, and Holm's correction, which scipy
lacks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_SEEDS = 3  # for a t interval
LEAST_PROMPTS = 100  # for a bootstrap interval: with fewer, its coverage is below 95 %
RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the two-sided p-value of a zero mean.

    `n`: number of seeds or prompts, `of` names which.
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

    @property
    def decimals(self) -> int:
        """Decimals that show two digits of the interval's half-width."""
        size = ((self.high or 0.0) - (self.low or 0.0)) / 2 or abs(self.mean) / 10 or 1.0
        return min(max(1 - math.floor(math.log10(size)), 0), 6)

    def value(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.{self.decimals}f}"

    def bounds(self, between: str = ", ") -> str:
        """ "0.12, 0.34"; empty without an interval."""
        ends = [f"{x:.{self.decimals}f}" for x in (self.low, self.high) if x is not None]
        return between.join(ends)

    def text(self, sign: str = "") -> str:
        """ "0.23 [0.12, 0.34]"."""
        return f"{self.value(sign)} [{self.bounds()}]" if self.has_interval else self.value(sign)


def of_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number per seed, with Student's t from 3 different seeds on."""
    from scipy.stats import ttest_1samp

    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
    if n < LEAST_SEEDS or not math.isfinite(error) or error <= 1e-12 * abs(mean):
        return Estimate(mean, n=n)
    test: Any = ttest_1samp(values, 0)
    bounds = test.confidence_interval(LEVEL)
    return Estimate(mean, float(bounds.low), float(bounds.high), n, p=float(test.pvalue))


def of_prompts(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of one number per prompt, with a percentile bootstrap from 100 prompts on.

    Deterministic. The p-value is twice the share of resampled means on the other side of 0, at
    least 2 / (resamples + 1).
    """
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    if n < LEAST_PROMPTS or not np.ptp(array) > 0:
        return Estimate(mean, n=n, of="prompts")
    means = resample(array[None], seed)[0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))
    return Estimate(mean, float(low), float(high), n, "prompts", p)


def resample(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(S, N) -> (S, RESAMPLES) means of N values drawn from each row with replacement."""
    n = values.shape[1]
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return values @ (drawn.T / n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for multiple tests (Holm 1979); None (no test) stays None."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[i] = highest
    return corrected
