"""Algorithm 2 of EDM, compared with the algorithm in the coordinates of the paper."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from plugins.sampler.edm_heun import EDMHeun
from plugins.sampler.heun import Heun
from plugins.schedule.edm import EDM
from plugins.schedule.flow import Flow
from sandbox.contracts import ConfigError
from sandbox.data.randomness import Keyed
from tests.training_sessions import small

MEAN, STD, STEPS = 0.3, 0.5, 12
SCHEDULES = {"edm": EDM(EDM.Config()), "flow": Flow(Flow.Config())}
DRAWS = Keyed(0, 0, torch.arange(3), 3)


def start(count: int = 3, size: int = 4) -> Tensor:
    draws = Keyed(0, 0, torch.arange(count), count)
    return draws.normal("start", torch.empty(count, 2, 1, size, size)).double()


def posterior_mean(x: Tensor, level: Tensor | float) -> Tensor:
    """D(x; s), the best estimate for normal latents."""
    return MEAN + STD**2 / (STD**2 + level**2) * (x - MEAN)


def network(schedule):
    """The output whose estimate is the posterior mean."""

    def model(z_t: Tensor, t: Tensor, step: int) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        z0 = posterior_mean(z_t / alpha, sigma / alpha)
        return schedule.target(z0, (z_t - alpha * z0) / sigma, t)

    return model


def sampled(name: str, z: Tensor, draws=DRAWS, steps: int = STEPS, **settings) -> Tensor:
    sampler = EDMHeun(EDMHeun.Config(**settings))
    return sampler(network(SCHEDULES[name]), SCHEDULES[name], z, steps, draws)


def algorithm_2(
    x: Tensor, levels: list[float], churn: float, low: float, high: float, noise: float
) -> Tensor:
    """As in the paper, for levels t_0 .. t_N with t_N = 0."""
    count = len(levels) - 1
    for i, (t, t_next) in enumerate(pairwise(levels)):
        gamma = min(churn / count, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = min(t + gamma * t, levels[0])  # there is no time above the highest level
        eps = noise * DRAWS.normal(f"sampler_noise_{i}", x) if gamma else 0.0
        x_hat = x + math.sqrt(t_hat**2 - t**2) * eps
        d = (x_hat - posterior_mean(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next:
            d_next = (x - posterior_mean(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d + d_next) / 2
    return x


@pytest.mark.parametrize(
    ("churn", "low", "high", "noise"),
    [(0.0, 0.0, math.inf, 1.0), (4.0, 0.05, 50.0, 1.003), (80.0, 0.0, math.inf, 1.0)],
)
def test_a_run_equals_algorithm_2(churn, low, high, noise):
    edm, z = SCHEDULES["edm"], start()
    times = edm.times(STEPS, "trailing")
    levels = [*edm.level(times).double().tolist(), 0.0]
    expected = algorithm_2(z / edm.alpha(times[:1]).double(), levels, churn, low, high, noise)
    found = sampled("edm", z, churn=churn, churn_min=low, churn_max=high, noise=noise)
    # times and levels of the schedule are float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_without_churn_samples_equal_those_of_diffusers_at_the_first_order():
    """Their sampler is the Euler method: with one step to the lowest level, both agree closely."""
    judge = pytest.importorskip("diffusers").EDMEulerScheduler(
        sigma_min=0.004, sigma_max=160.0, sigma_data=1.0
    )
    edm, z, steps = SCHEDULES["edm"], start(), 400
    judge.set_timesteps(steps)
    x = z / edm.alpha(torch.ones(1)).double()
    for t, level in zip(judge.timesteps, judge.sigmas[:-1], strict=True):
        c_skip = 1 / (level**2 + 1)
        out = (posterior_mean(x, level) - c_skip * x) / (level / (level**2 + 1) ** 0.5)
        judge.scale_model_input(x, t)
        x = judge.step(out, t, x).prev_sample
    found = sampled("edm", z, steps=steps)
    assert (found - x).abs().max() < 0.02  # of the first-order method
    assert (found - x).abs().max() < (start() - x).abs().max() / 20


@pytest.mark.parametrize("name", [*SCHEDULES])
@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_normal_latents_are_sampled_with_their_mean_and_deviation(name, churn):
    count = 64
    draws = Keyed(0, 0, torch.arange(count), count)
    found = sampled(name, start(count, 16), draws, steps=60, churn=churn)
    # 32768 numbers; the rest is the error of the method and of the first level
    assert found.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert found.std().item() == pytest.approx(STD, abs=0.02)


def test_fresh_noise_changes_samples_only_with_churn_inside_its_interval():
    z, other = start(), Keyed(1, 0, torch.arange(3), 3)
    plain = sampled("edm", z)
    assert torch.equal(plain, sampled("edm", z, other))
    assert not torch.equal(sampled("edm", z, churn=5.0), sampled("edm", z, other, churn=5.0))
    assert torch.equal(plain, sampled("edm", z, churn=5.0, churn_min=1e6))


def test_on_edm_the_second_order_converges_faster_than_the_first():
    z = start()
    exact = sampled("edm", z, steps=512)
    coarse, fine = ((sampled("edm", z, steps=n) - exact).abs().max().item() for n in (16, 32))
    assert coarse / fine > 3  # 4 for the second order, 2 for the first


def test_other_samplers_run_on_the_schedule():
    edm, z = SCHEDULES["edm"], start()
    found = Heun(Heun.Config())(network(edm), edm, z, 64, DRAWS)
    torch.testing.assert_close(found, sampled("edm", z, steps=256), rtol=0, atol=0.02)


def test_schedules_without_a_time_for_each_level_are_refused():
    for words in (("schedule=ddpm",), ("schedule.t_start=1.0",)):
        with pytest.raises(ConfigError, match="edm_heun: needs a schedule with a time"):
            small("sampler=edm_heun", *words)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"churn": -1.0, "noise": math.nan}, ["churn", "noise"]),
        ({"churn_min": 2.0, "churn_max": 1.0}, ["churn_max"]),
        ({"churn_min": -1.0, "churn_max": math.nan}, ["churn_min", "churn_max"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(EDMHeun.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
