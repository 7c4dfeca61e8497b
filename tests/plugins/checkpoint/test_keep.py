"""When a checkpoint is due, and valid settings."""

import pytest

from plugins.checkpoint.keep import Keep
from sandbox.contracts import ConfigError
from sandbox.wiring import wire
from tests.helpers import composed, preset


def test_checkpoints_are_due_at_a_fixed_interval():
    keep = Keep(Keep.Config(every=3))
    assert [s for s in range(1, 10) if keep.due(s)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"every": 0, "keep": 0, "attempts": 0}, ["every", "keep", "attempts"]),
        ({"milestones": -1, "wait": float("nan")}, ["milestones", "wait"]),
        ({"best": -1, "weights_every": -1}, ["best", "weights_every"]),
        ({"every": 200, "milestones": 300}, ["milestones"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    assert [p.partition("=")[0] for p in Keep.Config(**settings).problems()] == named


def test_keeping_the_best_needs_a_callback_that_measures_them():
    keep = ("checkpoint.best=3", "checkpoint.every=10")
    with pytest.raises(ConfigError, match=r"checkpoint\.best=3: val/loss_ema is not measured"):
        wire(composed(*keep))
    with pytest.raises(ConfigError, match=r"callbacks\.val_loss\.every=10"):
        wire(composed(*keep, "callbacks=[val_loss]", "callbacks.val_loss.every=4"))
    wire(composed(*keep, "callbacks=[val_loss]", "callbacks.val_loss.every=5"))


def test_the_best_ema_needs_an_ema():
    keep = ("checkpoint.best=3", "callbacks=[val_loss]", "ema=none")
    with pytest.raises(ConfigError, match=r"val/loss_ema: ema=none .*best_of=val/loss, or another"):
        wire(composed(*keep))
    wire(composed(*keep, "checkpoint.best_of=val/loss"))


def test_published_policies():
    """LDM: top 3 and the last, each epoch. DynamiCrafter: 9,000 and, weights only, 10,000."""
    ldm, crafter = (
        preset("checkpoint", "keep_ldm_celebahq"),
        preset("checkpoint", "keep_dynamicrafter"),
    )
    assert (ldm.best, ldm.best_of, ldm.keep) == (3, "val/loss_simple_ema", 1)
    assert ldm.every == -(-25_000 // 48)
    assert (crafter.every, crafter.keep, crafter.weights_every) == (9000, 1, 10_000)
