"""Schedule-free AdamW: the steps, and the averages that everything but training uses."""

import math

import pytest
import torch
from torch import nn

from plugins.optimizer.schedule_free_adamw import ScheduleFreeAdamWPlugin
from sandbox.contracts import ConfigError
from sandbox.storage import checkpoint, weight_files
from sandbox.training.build import load_system
from sandbox.training.loop import fit
from sandbox.training.validation import training_losses
from tests.training_sessions import differing, session, small, train_until

ENGINE = ("optimizer=schedule_free_adamw", "lr_schedule=constant", "ema=none", "steps=6")


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in shapes]


def optimizer(params: list[nn.Parameter], lr: float = 1e-2, **settings) -> torch.optim.Optimizer:
    named = [(str(i), p) for i, p in enumerate(params)]
    return ScheduleFreeAdamWPlugin(ScheduleFreeAdamWPlugin.Config(**settings)).build(named, lr)


def train(params: list[nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    """Steps with a linear warm-up of three steps."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype) + p.detach()
        for group in opt.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        opt.step()


@pytest.mark.parametrize("step_power", [0.0, 1.5])
def test_steps_and_averages_equal_the_authors_package(step_power):
    judge = pytest.importorskip("schedulefree")
    ours, theirs = parameters((6, 4), (5,)), parameters((6, 4), (5,))
    opt = optimizer(ours, betas=(0.9, 0.99), weight_decay=0.1, step_power=step_power)
    other = judge.AdamWScheduleFree(
        theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, r=step_power, foreach=False
    )
    other.train()
    train(ours, opt, range(12))
    train(theirs, other, range(12))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    other.eval()
    for (_, average), b in zip(opt.averages(), theirs, strict=True):
        torch.testing.assert_close(average, b.detach())


def test_with_equal_weights_the_average_is_the_mean_of_all_iterates():
    (p,) = parameters((3,))
    opt, iterates = optimizer([p], lr_power=0.0), []
    for step in range(5):
        train([p], opt, range(step, step + 1))
        iterates.append(opt.state[p]["z"].clone())
    ((_, average),) = opt.averages()
    torch.testing.assert_close(average, torch.stack(iterates).mean(0))


def test_state_can_be_saved_and_continues_bit_for_bit(tmp_path):
    straight, resumed = parameters((6, 5), (4,)), parameters((6, 5), (4,))
    train(straight, optimizer(straight), range(9))
    first = optimizer(resumed)
    train(resumed, first, range(4))
    saved = checkpoint.save(tmp_path, {"optimizer": first.state_dict()}, 4)
    second = optimizer(resumed)
    second.load_state_dict(checkpoint.load(saved)["optimizer"])
    train(resumed, second, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


# --- in a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", ["none", "warmup"])
def test_a_stopped_run_continues_bit_for_bit(ema, tmp_path):
    root = small(*ENGINE, f"ema={ema}", "checkpoint.every=3")
    straight = train_until(None, root, tmp_path / "straight")
    train_until(4, root, tmp_path / "resumed")
    resumed = train_until(None, root, tmp_path / "resumed")
    assert straight["training_weights"]
    assert not differing(straight, resumed)


def test_files_samples_and_validation_use_the_averages(tmp_path):
    root = small(
        *ENGINE, "checkpoint.every=6", "callbacks=[val_loss]", "callbacks.val_loss.every=6"
    )
    with session(root, tmp_path) as training:
        fit(training)
        averages = training.optimizer_averages()
        parameters = dict(training.system.named_parameters())
        assert averages.keys() == {n for n, p in parameters.items() if p.requires_grad}
        assert not torch.equal(*(x["backbone.patch_in.weight"] for x in (averages, parameters)))
        before = {n: p.detach().clone() for n, p in parameters.items()}
        training.validate(4)
        with training.ema_weights():
            assert not differing(averages, {n: parameters[n].detach() for n in averages})
            inside = training_losses(training.system.eval(), _val(training), 4)["loss"]
        assert training.measured[1]["val/loss"] == inside
        assert not differing(before, {n: p.detach() for n, p in parameters.items()})
        training.save_weights(tmp_path / "files")
        folder = training.run.folder
    written = weight_files.read(tmp_path / "files" / weight_files.LIVE)
    loaded = dict(load_system(folder).named_parameters())
    for name, average in averages.items():
        assert torch.equal(written[name], average), name
        assert torch.equal(loaded[name], average), name


def _val(training):
    from sandbox.config import registry

    return registry.create(training.root.data).split("val")


def test_the_ema_averages_the_averages(tmp_path):
    root = small(*ENGINE, "ema=warmup", "ema.warmup=false", "ema.decay=0.0")
    with session(root, tmp_path) as training:
        fit(training)
        assert not differing(training.ema.average, training.optimizer_averages())


def test_deepspeed_is_refused():
    with pytest.raises(ConfigError, match=r"trainer=deepspeed.*averages.*trainer=ddp"):
        small("trainer=deepspeed", "optimizer=schedule_free_adamw")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"betas": (0.0, 1.0)}, ["betas[0]", "betas[1]"]),
        ({"weight_decay": math.nan, "eps": -1.0}, ["weight_decay", "eps"]),
        ({"step_power": -1.0, "lr_power": math.inf}, ["step_power", "lr_power"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(ScheduleFreeAdamWPlugin.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
