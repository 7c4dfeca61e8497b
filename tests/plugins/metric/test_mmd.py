"""metric=kid and metric=mmd: reference packages, known values and settings."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from torchmetrics.image.kid import poly_mmd

from plugins._blocks import mmd
from plugins._blocks.mmd import CUBIC, squared_mmd, subset_mmds
from plugins.metric.kid import KID
from plugins.metric.mmd import MMD
from sandbox.contracts import ConfigError
from tests.helpers import composed
from tests.inputs import tensor

X, Y = tensor(30, 8).double(), (tensor(40, 8, seed=1) * 1.3 + 0.5).double()


def clips(count: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 4, 16, 16, generator=generator) * 2 - 1


def test_the_cubic_unbiased_estimate_is_that_of_torchmetrics():
    y = Y[:30]  # it takes sets of one size
    assert squared_mmd(CUBIC, X, y) == pytest.approx(poly_mmd(X, y).item(), rel=1e-9)


def test_the_kid_is_that_of_torchmetrics_over_the_subsets_of_torch_fidelity():
    rng = np.random.RandomState(2020)  # its seed; it draws from x, then from y
    subsets = [[v[rng.choice(len(v), 20, replace=False)] for v in (X, Y)] for _ in range(7)]
    want = torch.stack([poly_mmd(x, y) for x, y in subsets])
    torch.testing.assert_close(subset_mmds(X, Y, 7, 20), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"kernel": "rbf", "sigma": 1.7}, lambda a, b: rbf_kernel(a, b, 1 / (2 * 1.7**2))),
        (
            {"kernel": "polynomial", "degree": 2, "coef": 0.0},
            lambda a, b: polynomial_kernel(a, b, 2, None, 0),
        ),
    ],
)
def test_mmd_has_the_mean_kernel_values_of_scikit_learn(settings, reference, biased, monkeypatch):
    monkeypatch.setattr(mmd, "ROWS", 16)  # several blocks
    kernel = MMD(MMD.Config(**settings))._kernel()
    xx, yy, xy = reference(X, X), reference(Y, Y), reference(X, Y)
    if biased:
        want = xx.mean() + yy.mean() - 2 * xy.mean()
    else:
        others = [k[~np.eye(len(k), dtype=bool)].mean() for k in (xx, yy)]
        want = sum(others) - 2 * xy.mean()
    assert squared_mmd(kernel, X, Y, biased) == pytest.approx(want, rel=1e-6)


def test_the_unbiased_estimate_of_equal_distributions_is_zero_on_average():
    draws = [
        squared_mmd(CUBIC, tensor(10, 4, seed=i), tensor(10, 4, seed=99 + i)) for i in range(200)
    ]
    values = torch.tensor(draws)
    assert values.mean().abs() < 3 * values.std() / 200**0.5
    assert (values < 0).any()


@pytest.mark.parametrize("network", ["random2d", "random3d"])
@pytest.mark.parametrize("plugin", [KID, MMD])
def test_darker_clips_are_farther_from_real_clips_than_other_real_clips(plugin, network):
    metric = plugin(plugin.Config(network=network))
    metric.fit(clips(), [])
    name = next(iter(metric.meaning()))
    assert name.endswith("video" if network == "random3d" else "image")
    other, dark = (metric.score(v, [])[name] for v in (clips(seed=1), clips(seed=1) - 0.5))
    assert abs(other) < dark / 10
    assert metric.score(clips(1)[:, :, :1], []) == {}


def test_the_kid_does_not_depend_on_the_number_of_clips_as_the_biased_estimate_does():
    few, many = tensor(12, 16, seed=3), tensor(400, 16, seed=4)
    unbiased = [squared_mmd(CUBIC, rows, tensor(400, 16)) for rows in (few, many)]
    biased = [squared_mmd(CUBIC, rows, tensor(400, 16), biased=True) for rows in (few, many)]
    assert biased[0] - biased[1] > 3 * abs(unbiased[0] - unbiased[1])


def test_features_of_unit_length_ignore_a_factor():
    metric = MMD(MMD.Config(unit_length=True))
    metric.features = lambda video: video.flatten(1)
    metric.features.of_clips = True
    metric.fit(clips(), [])
    a, b = (metric.score(clips(seed=1) * factor, [])["mmd_video"] for factor in (1.0, 0.5))
    assert a == pytest.approx(b, abs=1e-3)


def test_equal_real_clips_determine_no_sigma():
    with pytest.raises(ConfigError, match=r"metric.sigma=null.*set metric.sigma"):
        MMD(MMD.Config()).fit(clips(1).expand(4, -1, -1, -1, -1), [])


def test_bad_settings_are_reported():
    def problems(name: str, *overrides: str) -> str:
        return "\n".join(composed(f"metric={name}", *overrides).metric.problems())

    assert "kernel='laplace': want one of ['rbf'" in problems("mmd", "metric.kernel=laplace")
    wrong = problems("mmd", "metric.kernel=polynomial", "metric.sigma=2")
    assert "sigma=2.0: is of kernel=rbf only" in wrong
    assert "subset_size=1: want >= 2" in problems("kid", "metric.subset_size=1")
    assert "network='vgg'" in problems("kid", "metric.network=vgg")
