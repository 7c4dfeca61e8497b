"""Frechet distance of two sets of features, each modelled as a Gaussian (Dowson & Landau 1982).

With InceptionV3 features it is FID (Heusel et al. 2017, 1706.08500, eq. 6), with I3D features FVD
(Unterthiner et al. 2018, 1812.01717).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Gaussian(NamedTuple):
    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)


def gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of (N, D) in float64; N >= 2."""
    rows = features.double()
    centred = rows - rows.mean(0)
    return Gaussian(rows.mean(0), centred.T @ centred / (len(rows) - 1))


def distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2), so the trace of its root
    is a sum of real roots. This is exact for singular covariances too, as with few samples.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * common
    return ((a.mean - b.mean).square().sum() + spread).clamp_min(0).item()
