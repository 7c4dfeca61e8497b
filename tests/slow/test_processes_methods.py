"""Two processes equal one, for methods that call the network several times in a step."""

import pytest

from tests.training_jobs import TWO, done, job, states
from tests.training_sessions import differing

pytestmark = pytest.mark.slow

METHODS = {
    "mean_flow": ("method=mean_flow", "method.guidance_scale=2", "guidance=none"),
    "shortcut": ("method=shortcut", "method.bootstrap=0.5"),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("methods")
    jobs = []
    for name, words in METHODS.items():
        words = (*words, "steps=3")
        jobs.append(job(f"{name} twice", out, *words, "data.batch_size=2", "trainer.accumulate=2"))
        jobs.append(job(f"{name} ddp", out, *words, "trainer=ddp", *TWO))
    return done(out, jobs)


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_1_on_two_is_accumulation_2_on_one_bit_for_bit(out, method):
    one, two = states(out, f"{method} twice"), states(out, f"{method} ddp")
    assert sorted(two) == [1, 2, 3]
    for step in one:
        for part in ("weights", "ema", "optimizer"):
            assert not differing(one[step][part], two[step][part]), (step, part)
