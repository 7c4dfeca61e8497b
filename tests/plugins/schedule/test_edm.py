"""EDM: preconditioning, noise levels and times, compared with diffusers and with the paper."""

import math

import pytest
import torch

from plugins.loss.mse import MSE
from plugins.schedule.edm import EDM
from sandbox.data.randomness import Keyed

PUBLISHED = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "mean": -1.2}


def made(**settings) -> EDM:
    cfg = EDM.Config(**settings)
    assert not list(cfg.problems())
    return EDM(cfg)


def normal(name: str, count: int = 6) -> torch.Tensor:
    return Keyed(0, 0, torch.arange(count), count).normal(name, torch.empty(count, 2, 3, 4, 4))


@pytest.fixture
def judge():
    return pytest.importorskip("diffusers").EDMEulerScheduler(sigma_data=0.5)


def test_inputs_and_estimates_equal_those_of_diffusers(judge):
    edm, z0, eps, out = made(**PUBLISHED), normal("z0"), normal("eps"), normal("out")
    t = torch.tensor([0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
    level = edm.level(t).view(-1, 1, 1, 1, 1)
    x = z0 + level * eps
    z_t = edm.noised(z0, eps, t)
    torch.testing.assert_close(edm.inputs(z_t, t)[0], judge.precondition_inputs(x, level))
    expected = judge.precondition_outputs(x, out, level)
    torch.testing.assert_close(edm.denoised(out, z_t, t).z0, expected, rtol=1e-4, atol=1e-5)


def test_backbone_times_are_c_noise_on_another_scale(judge):
    edm, t = made(**PUBLISHED), torch.linspace(0, 1, 9)
    ends = torch.tensor([0.002, 80.0])
    low, high = judge.precondition_noise(ends)
    c_noise = judge.precondition_noise(edm.level(t))
    expected = 1000 * (c_noise - low) / (high - low)
    found = edm.inputs(torch.zeros(9, 1, 1, 1, 1), t)[1]
    torch.testing.assert_close(found, expected.clamp(0, 999.9999), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 18, 64])
def test_sampling_levels_equal_those_of_diffusers(judge, steps):
    judge.set_timesteps(steps)
    edm = made(**PUBLISHED)
    found = edm.level(edm.times(steps, "trailing"))
    torch.testing.assert_close(found, judge.sigmas[:-1].float(), rtol=1e-4, atol=0)


def test_levels_in_training_are_lognormal():
    count = 4096
    edm = made(mean=-1.2, std=1.0)
    log = edm.level(edm.draw_t(Keyed(0, 0, torch.arange(count), count))).double().log()
    # stratified over 4096; independent draws would have an error of 0.016
    assert log.mean().item() == pytest.approx(-1.2, abs=3e-3)
    assert log.std().item() == pytest.approx(1.0, abs=5e-3)


def test_times_and_levels_are_inverse():
    edm, t = made(), torch.linspace(0, 1, 33)
    torch.testing.assert_close(edm.time_of(edm.level(t)), t, rtol=0, atol=1e-5)
    assert edm.time_of(torch.tensor([1e-9, 1e9])).tolist() == [0, 1]


def test_the_loss_is_the_weighted_error_of_the_estimate():
    """lambda(s) |D(x; s) - z0|^2 with lambda = (s^2 + sigma_data^2) / (s sigma_data)^2."""
    edm, z0, eps, out = made(**PUBLISHED), normal("z0"), normal("eps"), normal("out")
    t = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    level = edm.level(t)
    error = edm.denoised(out, edm.noised(z0, eps, t), t).z0 - z0
    weight = (level**2 + 0.25) / (level * 0.5) ** 2
    expected = weight * error.square().flatten(1).mean(1)
    found = MSE(MSE.Config())(edm, out, z0, eps, t).per_sample
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_inputs_and_targets_have_unit_variance_at_every_level():
    """For latents with the standard deviation sigma_data."""
    edm = made(**PUBLISHED)
    z0, eps = (0.5 * normal("z0", 4000), normal("eps", 4000))
    for at in (0.0, 0.3, 0.7, 1.0):
        t = torch.full((4000,), at)
        inputs, _ = edm.inputs(edm.noised(z0, eps, t), t)
        for x in (inputs, edm.target(z0, eps, t)):
            assert x.std().item() == pytest.approx(1, abs=0.01)


def test_for_unit_variance_the_target_is_the_negative_v():
    edm, z0, eps = made(), normal("z0"), normal("eps")
    t = torch.linspace(0, 1, 6)
    v = edm.alpha(t) * eps - edm.sigma(t) * z0
    torch.testing.assert_close(edm.target(z0, eps, t), -v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sigma_min": 0.0, "std": 0.0}, ["sigma_min", "std"]),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, ["sigma_max"]),
        ({"sigma_data": math.nan, "rho": 0.5}, ["sigma_data", "rho"]),
        ({"mean": math.inf, "t_draw": "all"}, ["mean", "t_draw"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(EDM.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
