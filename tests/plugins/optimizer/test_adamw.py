"""AdamW equals torch's, with the configured settings."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from plugins.optimizer.adamw import AdamWPlugin


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def optimizer(model: nn.Module, lr: float = 1e-2, **settings) -> torch.optim.Optimizer:
    return AdamWPlugin(AdamWPlugin.Config(**settings)).build(model.named_parameters(), lr)


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_steps_equal_plain_adamw():
    ours, plain = net(), net()
    train(ours, optimizer(ours), 0, 20)
    reference = torch.optim.AdamW(
        plain.parameters(),
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        foreach=False,
        fused=False,
    )
    train(plain, reference, 0, 20)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fused kernels round differently


def test_learning_rate_zero_changes_nothing():
    model = net()
    train(model, optimizer(model, lr=0.0), 0, 3)
    assert same(model, net())


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    opt = optimizer(model)
    assert sum(len(g["params"]) for g in opt.param_groups) == 4


@pytest.mark.parametrize("plain", [True, False])
def test_weight_decay_skips_vectors_without_decay_vectors(plain):
    decays = {
        id(p): g["weight_decay"]
        for model in [net()]
        for g in optimizer(model, decay_vectors=plain, weight_decay=0.1).param_groups
        for p in g["params"]
        if p.ndim < 2
    }
    assert len(decays) == 4 and set(decays.values()) == {0.1 if plain else 0.0}


def test_resumed_training_equals_the_uninterrupted_one_bit_for_bit():
    straight, resumed = net(), net()
    train(straight, optimizer(straight), 0, 10)
    first = optimizer(resumed)
    train(resumed, first, 0, 4)
    second = optimizer(resumed)
    second.load_state_dict(first.state_dict())
    train(resumed, second, 4, 10)
    assert same(straight, resumed)


def test_configured_settings_override_those_of_the_state():
    old, new = optimizer(net(), lr=1.0), optimizer(net(), lr=0.5, betas=(0.5, 0.6), eps=1e-5)
    new.load_state_dict(old.state_dict())
    group = new.param_groups[0]
    assert (group["initial_lr"], group["betas"], group["eps"]) == (0.5, (0.5, 0.6), 1e-5)


def test_learning_rate_schedule_continues_after_a_resume():
    opt = optimizer(net(), lr=1.0)
    schedule = LambdaLR(opt, lambda n: 1 / (1 + n))
    for _ in range(3):
        opt.step()
        schedule.step()
    again = optimizer(net(), lr=1.0)
    again_schedule = LambdaLR(again, lambda n: 1 / (1 + n))
    again.load_state_dict(opt.state_dict())
    again_schedule.load_state_dict(schedule.state_dict())
    assert again.param_groups[0]["lr"] == 0.25


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    assert len(optimizer(model).param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": (1.0, 0.9)}, ["betas[0]"]),
        ({"betas": (0.9, math.nan), "eps": 0.0}, ["betas[1]", "eps"]),
        ({"weight_decay": -1.0}, ["weight_decay"]),
        ({"weight_decay": math.inf}, ["weight_decay"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(AdamWPlugin.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
