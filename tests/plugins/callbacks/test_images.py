"""Steps at which the image logger samples, also after a resume."""

from types import SimpleNamespace

import pytest

from plugins.callbacks.images import Images


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [1, 2, 4, 6, 12, 18]),
        ({"increase_log_steps": False}, [6, 12, 18]),
        ({"every": 8}, [1, 2, 4, 8, 16]),
    ],
)
def test_images_are_due_at_powers_of_two_and_then_every_n(settings, want):
    cfg = Images.Config(**{"every": 6, **settings})
    assert [n for n in range(1, 20) if cfg.due(n)] == want


def sampled(callback: Images, batches: range, accumulate: int = 2) -> list[int]:
    """Micro-batches after which it samples."""
    found: list[int] = []
    for i in batches:
        callback.training = SimpleNamespace(
            step=i // accumulate,
            just_stepped=i % accumulate == 0,
            show=lambda rows, count, chain, i=i: found.append(i),
        )
        callback.on_train_batch_end(None, None, None, None, 0)
    return found


@pytest.mark.parametrize(("unit", "want"), [("step", [6, 12]), ("micro_batch", [3, 6, 9, 12])])
def test_it_counts_steps_or_micro_batches(unit, want):
    cfg = Images.Config(every=3, unit=unit, increase_log_steps=False)
    assert sampled(Images(cfg), range(1, 13)) == want


def test_the_count_continues_after_a_resume():
    cfg = Images.Config(every=5, unit="micro_batch", increase_log_steps=False)
    first = Images(cfg)
    assert sampled(first, range(1, 5)) == []
    second = Images(cfg)
    second.load_state_dict(first.state_dict())
    assert sampled(second, range(5, 9)) == [5]


def test_rows_that_nobody_draws_are_named():
    from sandbox.training.image_rows import ROWS

    (problem,) = Images.Config(rows=("samples", "faces")).problems()
    assert problem.startswith("rows='faces'")
    assert not list(Images.Config(rows=("samples", *ROWS)).problems())
