"""When a checkpoint is due, and which settings make sense."""

import pytest

from plugins.checkpoint.keep import Keep


def test_checkpoint_is_due_every_so_many_steps():
    keep = Keep(Keep.Config(every=3))
    assert [s for s in range(1, 10) if keep.due(s)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"every": 0, "keep": 0, "attempts": 0}, ["every", "keep", "attempts"]),
        ({"milestones": -1, "wait": float("nan")}, ["milestones", "wait"]),
        ({"every": 200, "milestones": 300}, ["milestones"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    assert [p.partition("=")[0] for p in Keep.Config(**settings).problems()] == named
