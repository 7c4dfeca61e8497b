"""Learning-rate factors: boundaries of the default, and published numbers."""

import json
import math
from pathlib import Path

import pytest

from plugins.lr_schedule.constant import Constant
from plugins.lr_schedule.lambda_linear import LambdaLinear
from plugins.lr_schedule.lambda_warmup_cosine import LambdaWarmupCosine
from plugins.lr_schedule.warmup_cosine import WarmupCosine

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/ldm/lr_schedulers.json").read_text())
ALL = (Constant, WarmupCosine, LambdaLinear, LambdaWarmupCosine)


# --- warmup_cosine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / 50),
        (24, 0.5),
        (49, 1.0),
        (360, 1.0),  # 30 %
        (780, (1 + 0.02) / 2),  # halfway down
        (1200, 0.02),
        (5000, 0.02),
    ],
)
def test_default_run_warms_up_holds_and_decays(step, factor):
    assert WarmupCosine.Config().factor(step, 1200) == pytest.approx(factor, rel=1e-12)


def test_two_steps_are_enough():
    factors = [WarmupCosine.Config().factor(step, 2) for step in range(2)]
    assert all(0 < f <= 1 for f in factors)


@pytest.mark.parametrize("hold", [0.0, 1.0])
def test_the_constant_phase_can_be_empty_or_the_full_run(hold):
    factors = [WarmupCosine.Config(warmup=0, hold=hold).factor(s, 10) for s in range(11)]
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(1.0 if hold else 0.02)


def test_constant_is_constant_after_its_warmup():
    assert [Constant.Config(warmup=4).factor(s, 8) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Constant.Config().factor(0, 1) == 1.0


# --- published ------------------------------------------------------------------------------------


def published(name: str) -> tuple[dict, list[tuple[int, float]]]:
    record = GOLDEN[name]
    return record["kwargs"], list(zip(record["n"], record["out"], strict=True))


@pytest.mark.parametrize(
    ("plugin", "name"),
    [(LambdaLinear, "LambdaLinearScheduler"), (LambdaWarmupCosine, "LambdaWarmUpCosineScheduler2")],
)
def test_cycles_equal_the_published_ones(plugin, name):
    kwargs, expected = published(name)
    cfg = plugin.Config(**{k: tuple(v) for k, v in kwargs.items()})
    for n, factor in expected:
        assert cfg.factor(n, 1) == pytest.approx(factor, rel=1e-12), n


def test_one_cycle_equals_the_published_single_cosine():
    kwargs, expected = published("LambdaWarmUpCosineScheduler")
    cfg = LambdaWarmupCosine.Config(
        warm_up_steps=(kwargs["warm_up_steps"],),
        f_start=(kwargs["lr_start"],),
        f_max=(kwargs["lr_max"],),
        f_min=(kwargs["lr_min"],),
        cycle_lengths=(kwargs["max_decay_steps"],),
    )
    for n, factor in expected:
        assert cfg.factor(n, 1) == pytest.approx(factor, rel=1e-12), n


@pytest.mark.parametrize("plugin", [LambdaLinear, LambdaWarmupCosine])
def test_last_factor_stays_after_the_last_cycle(plugin):
    cfg = plugin.Config(f_min=(0.1,), cycle_lengths=(100,))
    assert cfg.factor(10_000, 1) == cfg.factor(100, 1) == pytest.approx(0.1)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ALL)
def test_defaults_are_valid_and_positive_at_every_step(plugin):
    cfg = plugin.Config()
    assert list(cfg.problems()) == []
    assert all(0 < cfg.factor(step, 1200) <= 1 for step in range(1200))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Constant.Config(warmup=-1), ["warmup"]),
        (WarmupCosine.Config(hold=1.5, floor=-1.0), ["hold", "floor"]),
        (WarmupCosine.Config(hold=math.nan, warmup=-1), ["warmup", "hold"]),
        (
            LambdaLinear.Config(f_max=(1.0, 2.0)),
            ["f_max has 2 entries: want 1, one for each cycle"],
        ),
        (LambdaLinear.Config(cycle_lengths=(0,)), ["cycle_lengths[0]", "warm_up_steps[0]"]),
        (LambdaWarmupCosine.Config(warm_up_steps=(1200,)), ["warm_up_steps[0]"]),
        (LambdaWarmupCosine.Config(f_min=(math.nan,)), ["f_min[0]"]),
        (LambdaLinear.Config((), (), (), (), (), ()), ["cycle_lengths"]),
    ],
)
def test_every_bad_setting_is_named(config, named):
    assert [p.partition("=")[0] for p in config.problems()] == named
