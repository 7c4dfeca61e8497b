"""SOAP equals an independent implementation, and refuses sharded weights."""

import math

import pytest
import torch
from torch import nn

from plugins.optimizer.soap import SOAPPlugin
from sandbox.contracts import ConfigError
from tests.training_sessions import small


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]


def optimizer(params: list[nn.Parameter], lr: float = 1e-2, **settings) -> torch.optim.Optimizer:
    named = [(str(i), p) for i, p in enumerate(params)]
    return SOAPPlugin(SOAPPlugin.Config(**settings)).build(named, lr)


def train(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    """Steps with random gradients of full rank, keyed by the step."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype) + 0.1 * p.detach()
        opt.step()


def test_steps_equal_an_independent_implementation():
    judge = pytest.importorskip("pytorch_optimizer")
    shapes = (6, 6), (5,), (4, 6, 3), (6, 30)  # the last has an axis above max_dim
    ours, theirs = parameters(*shapes), parameters(*shapes)
    train(ours, optimizer(ours, every=3, max_dim=12, weight_decay=0.1), range(20))
    other = judge.SOAP(
        theirs, lr=1e-2, betas=(0.95, 0.95), weight_decay=0.1, precondition_frequency=3,
        max_precondition_dim=12,
    )  # fmt: skip
    train(theirs, other, range(20))
    for a, b in zip(ours, theirs, strict=True):
        # their bases are float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vectors_get_adam_after_the_first_step():
    (ours,), (plain,) = parameters((7,)), parameters((7,))
    train([ours], optimizer([ours], weight_decay=0.0), range(6))
    adam = torch.optim.Adam([plain], lr=1e-2, betas=(0.95, 0.95))
    train([plain], adam, range(1, 6))
    torch.testing.assert_close(ours, plain)


def test_steps_do_not_depend_on_the_coordinates_of_a_matrix():
    """Rotating weights and gradients rotates the updates, which Adam does not have."""
    turn, _ = torch.linalg.qr(parameters((6, 6))[0].detach())
    (plain,), (turned,) = parameters((6, 6)), parameters((6, 6))
    turned.data = turn @ turned.data
    one, other = optimizer([plain]), optimizer([turned])
    for step in range(12):
        g = torch.randn(6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        plain.grad, turned.grad = g, turn @ g
        one.step()
        other.step()
    torch.testing.assert_close(turned.detach(), turn @ plain.detach(), rtol=1e-6, atol=1e-8)


def test_state_can_be_saved_and_continues_bit_for_bit(tmp_path):
    from sandbox.storage import checkpoint

    straight, resumed = parameters((6, 5), (4,)), parameters((6, 5), (4,))
    train(straight, optimizer(straight, every=2), range(9))
    first = optimizer(resumed, every=2)
    train(resumed, first, range(4))
    saved = checkpoint.save(tmp_path, {"optimizer": first.state_dict()}, 4)
    second = optimizer(resumed, every=2)
    second.load_state_dict(checkpoint.load(saved)["optimizer"])
    train(resumed, second, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_parameter_without_gradient_is_unchanged():
    params = parameters((3, 3), (3, 3))
    opt = optimizer(params)
    before = params[1].detach().clone()
    for _ in range(3):
        params[0].grad = torch.ones_like(params[0])
        opt.step()
    assert torch.equal(params[1], before)


def test_sharded_weights_are_refused():
    for trainer in ("fsdp2", "deepspeed"):
        with pytest.raises(
            ConfigError, match=rf"trainer={trainer}: shards weights.*optimizer=soap"
        ):
            small(f"trainer={trainer}", "optimizer=soap")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": (1.0, math.nan)}, ["betas[0]", "betas[1]"]),
        ({"weight_decay": -1.0, "eps": 0.0}, ["weight_decay", "eps"]),
        ({"every": 0, "max_dim": 0}, ["every", "max_dim"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(SOAPPlugin.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
