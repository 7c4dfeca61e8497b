"""Maximum mean discrepancy (MMD) of two sets of features (Gretton et al. 2012, JMLR 13).

The squared distance between the kernel mean embeddings of both sets, in float64. The Kernel
Inception Distance is its unbiased estimate with a cubic kernel, averaged over random subsets
(Binkowski et al. 2018, 1801.01401, section 4).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> (N, M)
ROWS = 1024  # of a kernel matrix at once
SUBSET_SEED = 2020  # torch-fidelity's


def polynomial(x: Tensor, y: Tensor, degree: int, gamma: float | None, coef: float) -> Tensor:
    """(gamma x.y + coef)^degree; gamma=None is 1 / D."""
    return (x @ y.T * (1 / x.shape[1] if gamma is None else gamma) + coef) ** degree


def rbf(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squares.clamp_min(0) / (2 * sigma**2))


CUBIC: Kernel = partial(polynomial, degree=3, gamma=None, coef=1.0)  # of the KID


def squared_mmd(kernel: Kernel, x: Tensor, y: Tensor, biased: bool = False) -> float:
    """MMD^2 of x (N, D) and y (M, D), each with at least 2 rows.

    The biased estimate (eq. 5) is never negative; the unbiased one (eq. 3) leaves out the pairs of
    a row with itself, and is negative in half of the cases where both sets are alike.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    (xx, x_self), (yy, y_self), (xy, _) = (
        _sums(kernel, *pair) for pair in ((x, x), (y, y), (x, y))
    )
    if biased:
        return xx / n**2 + yy / m**2 - 2 * xy / (n * m)
    return (xx - x_self) / (n * (n - 1)) + (yy - y_self) / (m * (m - 1)) - 2 * xy / (n * m)


def _sums(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Sums of the kernel matrix and of its diagonal, block by block."""
    total = diagonal = 0.0
    for start in range(0, len(x), ROWS):
        block = kernel(x[start : start + ROWS], y)
        total += block.sum().item()
        if start < len(y):
            diagonal += block.diagonal(start).sum().item()
    return total, diagonal


def subset_mmds(x: Tensor, y: Tensor, subsets: int, size: int) -> Tensor:
    """(subsets,) unbiased MMD^2 with the cubic kernel of random subsets of x (N, D) and y (M, D).

    Subsets have `size` rows, or those of the smaller set if it has fewer. They are drawn in
    torch-fidelity's order, so that equal features give its value.
    """
    size, rng = min(size, len(x), len(y)), np.random.RandomState(SUBSET_SEED)
    values = []
    for _ in range(subsets):
        of_x, of_y = (
            rows[torch.from_numpy(rng.choice(len(rows), size, replace=False))] for rows in (x, y)
        )
        values.append(squared_mmd(CUBIC, of_x, of_y))
    return torch.tensor(values, dtype=torch.float64)


def median_distance(x: Tensor) -> float:
    """The median distance between two different rows of x (N, D), of at most the first ROWS."""
    return torch.pdist(x[:ROWS].double()).median().item()
