"""metric=frechet: known distances, networks and missing weights."""

import numpy as np
import pytest
import torch
from torch import nn

from plugins._blocks.feature_networks import MAKERS, OF_CLIPS, TORCHSCRIPT, Features
from plugins._blocks.frechet import Gaussian, distance, gaussian
from plugins._configs.features import NETWORKS
from plugins.metric.frechet import Frechet
from sandbox.contracts import StorageError
from tests.helpers import composed
from tests.inputs import tensor


def clips(count: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 4, 16, 16, generator=generator) * 2 - 1


def fitted(**settings) -> Frechet:
    metric = Frechet(Frechet.Config(**settings))
    metric.fit(clips(), [])
    return metric


def test_shifted_and_scaled_gaussians_have_the_analytic_distance():
    mean = torch.tensor([3.0, -4.0, 0.0]).double()
    a, b = (Gaussian(m, s * torch.eye(3).double()) for m, s in ((0 * mean, 1.0), (mean, 4.0)))
    assert distance(a, b) == pytest.approx(25 + 3 * (1 + 4 - 2 * 2))


@pytest.mark.parametrize("count", [40, 5])  # 8 features: invertible and singular covariance
def test_the_distance_equals_one_with_scipys_root(count):
    from scipy.linalg import sqrtm

    x, y = tensor(count, 8), tensor(count, 8, seed=1) @ tensor(8, 8, seed=2) + 0.5
    (ma, ca), (mb, cb) = (
        (v.double().numpy().mean(0), np.cov(v.double().numpy().T)) for v in (x, y)
    )
    root = sqrtm(ca @ cb + 1e-12 * np.eye(8)).real
    want = ((ma - mb) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert distance(gaussian(x), gaussian(y)) == pytest.approx(want, rel=1e-4)  # scipy's root


@pytest.mark.parametrize("network", ["random2d", "random3d"])
def test_equal_clips_have_distance_zero_and_darker_clips_a_large_one(network):
    metric = fitted(network=network)
    (name,) = metric.meaning()
    assert name == ("frechet_video" if network == "random3d" else "frechet_image")
    same, other, dark = (metric.score(v, [])[name] for v in (clips(), clips(seed=1), clips() - 0.5))
    assert same == pytest.approx(0, abs=1e-9)
    assert same < other < dark


def test_one_clip_has_no_distance():
    assert fitted().score(clips(1), []) == {}


def test_image_features_are_per_frame():
    features = Features("random2d", "random", "metric.weights")
    video = clips(3)
    assert torch.allclose(features(video)[:, 2:3], features(video[:, :, 2:3]), atol=1e-6)


@pytest.mark.parametrize(("network", "width"), [("inception_v3", 2048), ("r3d_18", 512)])
def test_torchvision_networks_return_their_last_pooling(network, width):
    found = Features(network, "random", "metric.weights")(clips(2)[:, :, :1])
    assert found.shape == ((2, width) if network == "r3d_18" else (2, 1, width))


def test_every_network_of_the_config_can_be_built():
    assert set(NETWORKS) == set(MAKERS) | TORCHSCRIPT
    assert {name for name, of_clips in NETWORKS.items() if of_clips} == OF_CLIPS


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).mean(2)


def test_any_torchscript_file_can_be_used(tmp_path):
    path = str(tmp_path / "mean.pt")
    torch.jit.script(Mean()).save(path)
    found = Features("script3d", path, "metric.weights")(clips())
    assert torch.allclose(found, clips().mean((2, 3, 4)), atol=1e-6)


def test_a_file_of_other_weights_is_an_error_with_name_size_and_fix(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(StorageError, match=r"metric.weights=.*0cc3c7bd.pth \(104 MB.*download it"):
        Features("inception_v3", str(path), "metric.weights")
    with pytest.raises(StorageError, match=r"cannot be read as TorchScript.*i3d_torchscript"):
        Features("i3d", str(path), "metric.weights")


def test_bad_settings_are_reported():
    def problems(*overrides: str) -> str:
        return "\n".join(composed("metric=frechet", *overrides).metric.problems())

    assert "network='vgg': want one of ['random2d'" in problems("metric.network=vgg")
    assert "weights='hub': network=random3d has none" in problems("metric.weights=hub")
    assert "network=i3d is a TorchScript file" in problems("metric.network=i3d")
