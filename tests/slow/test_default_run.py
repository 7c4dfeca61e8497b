"""The default run whole, by its command, over three seeds, in CI over one (CPU time: 80 s each)."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module", params=[0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2))]
)
def scores(request, tmp_path_factory) -> dict:
    """Score rows of a run with this seed, on all 192 clips of unseen captions."""
    out = tmp_path_factory.mktemp(f"seed_{request.param}")
    words = [f"seed={request.param}", f"out={out}", f"cache={out}/cache", "logger=null"]
    subprocess.run([sys.executable, "run.py", *words], cwd=CHECKOUT, check=True)
    (path,) = out.glob("*/metrics.json")
    found = json.loads(path.read_text())
    assert found["clips"] == 192
    return found["scores"]


def test_clips_move_and_are_coloured_as_their_captions_say(scores):
    assert scores["model"]["direction"] >= 0.95
    assert scores["model"]["colour"] >= 0.95


def test_digits_keep_their_shape_and_speed(scores):
    assert scores["model"]["shape"] >= 0.40
    assert 0.9 <= scores["model"]["speed"] <= 1.1


def test_clips_of_one_caption_differ_like_real_ones(scores):
    assert 0.15 <= scores["model"]["diversity"] <= 0.33
    assert scores["mean clip"]["diversity"] == 0


def test_an_untrained_model_does_nothing_of_it(scores):
    assert scores["untrained model"]["direction"] <= 0.15
    assert scores["untrained model"]["colour"] <= 0.40


def test_memory_stays_below_three_gib(scores):
    """Of the largest process so far."""
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20  # KiB
