"""Short versions of two known effects, from the command line; the full ones are in docs/effects."""

from __future__ import annotations

import json

import pytest

from sandbox.cli.main import _main
from sandbox.distributed.supervisor import in_this_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    """Runs an effect and reads its report: value of the swept setting -> metric -> mean."""
    cache = tmp_path_factory.mktemp("cache")

    def run(name: str, *words: str) -> dict[str, dict[str, float]]:
        out = tmp_path_factory.mktemp(name)
        placed = ["task.samples=1", f"out={out}", f"cache={cache}"]
        with in_this_process():
            assert _main(["-m", f"experiment=effects/{name}", *words, *placed]) == 0
        (path,) = out.glob("sweeps/*/report/report.json")
        return {
            value: {metric: n["mean"] for metric, n in variant["numbers"].items()}
            for variant in json.loads(path.read_text())["variants"]
            for value in variant["settings"].values()
        }

    return run


def test_at_zero_snr_v_prediction_samples_and_eps_prediction_does_not(means):
    found = means("prediction", "schedule.prediction=eps,v", "steps=30", "sampler.steps=10")
    assert found["eps"]["diversity"] > 0.8 > 0.5 > found["v"]["diversity"]  # real clips 0.3


def test_without_temporal_attention_the_same_noise_is_predicted_worse(means):
    """Both runs use the same clips, times and noise, so few steps are enough to compare them."""
    swept, few = "backbone.attention=factorised,spatial", ("task.score_clips=8", "sampler.steps=2")
    found = means("temporal_attention", swept, "steps=150", *few)
    assert found["factorised"]["loss"] < found["spatial"]["loss"] - 0.01
