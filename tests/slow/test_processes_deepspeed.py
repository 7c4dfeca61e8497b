"""DeepSpeed's ZeRO-2 trains what one process does, on CPUs; its checkpoints are everyone's."""

from __future__ import annotations

import pytest
import torch

from sandbox.runs import Run
from tests.engine import differing
from tests.jobs import ONE, STEPS, TWO, assert_close, done, job, metrics, moved, states

pytestmark = pytest.mark.slow

TWICE = ("trainer.accumulate=2", "data.clips_per_epoch=48")
# In half precision sums over other numbers of clips are rounded otherwise.
HALF = ("precision=bf16", "backbone.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    zero, offload = ("trainer=deepspeed_zero2", *TWO), ("trainer=deepspeed_zero2_offload", *TWO)
    jobs = [
        job("one", out, *ONE),
        job("zero", out, *zero, how="asked", rank=1, step=3),
        moved("zero to zero", out, "zero", *zero),
        moved("zero to one", out, "zero", *ONE),
        job("one twice", out, *ONE, *TWICE),
        job("offload twice", out, *offload, *TWICE),
        job("half", out, "data.batch_size=2", "trainer.accumulate=2", *HALF),
        job("half alone", out, "trainer=deepspeed_zero2_offload", "trainer.processes=1",
            "data.batch_size=2", "trainer.accumulate=2", *HALF),
    ]  # fmt: skip
    return done(out, jobs)


def test_two_processes_equal_one_with_the_same_global_batch(out):
    found = states(out, "zero") | states(out, "zero to zero")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert_close(states(out, "one"), found)
    one, two = metrics(out, "one"), Run(out / "zero to zero").metrics()
    for step in one:
        for name in ("loss", "grad_norm", "lr"):
            assert one[step][name] == pytest.approx(two[step][name], rel=2e-6), (step, name)


def test_they_do_so_with_accumulated_gradients_and_the_optimizer_on_the_host(out):
    assert_close(states(out, "one twice"), states(out, "offload twice"))


def test_one_process_with_the_optimizer_on_the_host_equals_one_without(out):
    assert_close(states(out, "half"), states(out, "half alone"))


def test_a_checkpoint_is_that_of_any_trainer(out):
    one, zero = states(out, "one")[3]["optimizer"], states(out, "zero")[3]["optimizer"]
    assert not differing(one["param_groups"], zero["param_groups"])
    assert one["state"].keys() == zero["state"].keys()
    for number, moments in one["state"].items():
        assert moments.keys() == zero["state"][number].keys()
        for name, value in moments.items():
            atol = 1e-4 * value.abs().max().item()
            found = zero["state"][number][name]
            torch.testing.assert_close(value, found, rtol=0, atol=atol)


def test_a_run_goes_on_in_one_process(out):
    found = states(out, "zero to one")
    assert sorted(found) == [4, 5]
    assert_close(states(out, "one"), found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero2_offload"])
def test_on_a_gpu_it_equals_a_process_without(name, tmp_path):
    pytest.importorskip("deepspeed")
    on = ("trainer.accelerator=cuda", "data.batch_size=4")
    zero = (f"trainer={name}", "trainer.processes=1", *on)
    done(tmp_path, [job("one", tmp_path, *on), job("zero", tmp_path, *zero)])
    assert_close(states(tmp_path, "one"), states(tmp_path, "zero"))
