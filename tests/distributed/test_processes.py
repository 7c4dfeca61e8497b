"""Several processes train what one does: DDP and FSDP2, their checkpoints, their ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sandbox.storage import checkpoint
from tests.helpers import tiny_weights
from tests.training_jobs import (
    ONE,
    STEPS,
    TWO,
    assert_close,
    done,
    job,
    metrics,
    moved,
    result,
    states,
)
from tests.training_sessions import differing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder with the results of all jobs."""
    out = tmp_path_factory.mktemp("several")
    ddp, fsdp = ("trainer=ddp", *TWO), ("trainer=fsdp2", *TWO)
    chosen = ("trainable=[attn,patch_out@0.1]", "steps=3")
    thrice = ("trainer.accumulate=3", "data.clips_per_epoch=48", "steps=3")
    stop = {"how": "asked", "rank": 1, "step": 3}
    dmd = ("method=dmd", "method.generator_steps=4", "method.turns=2", "sampler=lcm",
           "sampler.steps=4", "guidance=none", f"method.teacher={tiny_weights()}")  # fmt: skip
    jobs = [
        job("one dmd", out, *ONE, *dmd),
        job("ddp dmd", out, *ddp, *dmd),
        job("ddp dmd stopped", out, *ddp, *dmd, runs="ddp dmd resumed", **stop),
        job("ddp dmd resumed", out, *ddp, *dmd),
        job("one", out, *ONE),
        job("twice", out, "data.batch_size=2", "trainer.accumulate=2"),
        job("ddp", out, *ddp),
        job("fsdp", out, *fsdp),
        job("one thrice", out, *ONE, *thrice),
        job("ddp thrice", out, *ddp, *thrice),
        job("fsdp thrice", out, *fsdp, *thrice),
        job("one chosen", out, *ONE, *chosen),
        job("ddp chosen", out, *ddp, *chosen),
        job("fsdp chosen", out, *fsdp, *chosen),
        job("ddp stopped", out, *ddp, runs="ddp resumed", **stop),
        job("ddp resumed", out, *ddp),
        job("fsdp stopped", out, *fsdp, runs="fsdp resumed", **stop),
        job("fsdp resumed", out, *fsdp),
        job("source", out, *fsdp, **stop),
        moved("fsdp to one", out, "source", *ONE),
        moved("fsdp to ddp", out, "source", *ddp),
        job("nan", out, *ddp, how="nan", rank=1, step=3),
        job("skip", out, *ddp, "trainer.bad_step=skip", how="nan", rank=1, step=3),
        job("skip sharded", out, *fsdp, "trainer.bad_step=skip", how="nan", rank=1, step=3),
        job("error", out, *ddp, how="error", rank=1, step=3),
        job("kill", out, *fsdp, how="kill", rank=0, step=3),
        # Without a checkpoint, for whose writing a rank waits.
        job(
            "hang",
            out,
            *ddp[:-1],
            "trainer.timeout=5",
            "checkpoint.every=9",
            how="hang",
            rank=1,
            step=3,
        ),
    ]
    return done(out, jobs)


# --- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_same_global_batch(out, name):
    assert sorted(states(out, name)) == list(range(1, STEPS + 1))
    assert_close(states(out, "one"), states(out, name))


@pytest.mark.parametrize("name", ["ddp thrice", "fsdp thrice"])
def test_they_do_so_with_accumulated_gradients(out, name):
    assert_close(states(out, "one thrice"), states(out, name))


@pytest.mark.parametrize("name", ["ddp chosen", "fsdp chosen"])
def test_they_do_so_with_frozen_weights(out, name):
    one, two = states(out, "one chosen"), states(out, name)
    assert_close(one, two)
    frozen = {k for k in two[3]["weights"] if k not in two[3]["ema"]["average"]}
    assert frozen and all(torch.equal(two[3]["weights"][k], one[1]["weights"][k]) for k in frozen)
    assert len(two[3]["optimizer"]["state"]) == len(two[3]["ema"]["average"])


def test_accumulation_1_on_two_is_accumulation_2_on_one_bit_for_bit(out):
    one, two = states(out, "twice"), states(out, "ddp")
    for step in one:
        for part in ("weights", "ema", "optimizer"):
            assert not differing(one[step][part], two[step][part]), (step, part)
    assert metrics(out, "twice") == metrics(out, "ddp")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_all_ranks_are_in_one_state(out, name):
    assert not differing(states(out, name, 0), states(out, name, 1))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_metrics_are_those_of_all_processes(out, name):
    one, two = metrics(out, "one"), metrics(out, name)
    assert one.keys() == two.keys()
    for step in one:
        for metric in ("loss", "grad_norm", "lr"):
            # A norm is that before clipping to 0.1, which has been at work.
            assert one[step][metric] == pytest.approx(two[step][metric], rel=2e-6), (step, metric)
    assert all(row["grad_norm"] > 0.1 for row in one.values())


def test_after_training_the_first_rank_has_full_weights(out):
    assert result(out, "fsdp")["whole"]


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_signal_to_any_rank_stops_all_after_the_step_and_the_run_resumes(out, name):
    stopped = result(out, f"{name} stopped")
    assert stopped["code"] == 75
    assert "stopped by SIGTERM after step 3, which is saved" in stopped["error"]
    found = states(out, f"{name} stopped") | states(out, f"{name} resumed")
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, state in states(out, name).items():
        assert not differing(state, found[step]), step
    assert metrics(out, name) == metrics(out, f"{name} resumed")


def test_a_checkpoint_has_full_tensors(out):
    (folder,) = (out / "fsdp").glob("*/checkpoints")
    saved = checkpoint.load(checkpoint.newest(folder))
    assert not differing(saved, states(out, "fsdp")[STEPS])


@pytest.mark.parametrize("name", ["fsdp to one", "fsdp to ddp"])
def test_a_run_resumes_with_another_number_or_kind_of_processes(out, name):
    found = states(out, name)
    assert sorted(found) == [4, 5]
    assert_close(states(out, "one"), found)


# --- failures -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_rank_names_its_samples(out):
    found = result(out, "nan")
    assert found["code"] == 4
    assert "step 3: loss=nan" in found["error"]
    assert found["error"].count("train/") == 2  # those of rank 1, and not all four


@pytest.mark.parametrize("name", ["skip", "skip sharded"])
def test_all_ranks_skip_a_bad_step_of_one(out, name):
    one, other = states(out, name, 0), states(out, name, 1)
    assert not differing(one, other)
    for part in ("weights", "ema"):
        assert not differing(one[2][part], one[3][part]), part
        assert differing(one[3][part], one[4][part]), part
    (skipped,) = one[STEPS]["skipped"]
    assert skipped["step"] == 3
    assert skipped["samples"].count("train/") == 2
    assert metrics(out, name)[3]["skipped"] == 1


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [
        ("error", "rank 1: ValueError: planned failure", 1),
        ("kill", "rank 0: killed by SIGKILL", 5),
        ("hang", "rank 1: no answer to rank 0", 5),
    ],
)
def test_a_rank_that_fails_is_named_and_ends_the_run(out, name, said, code):
    found = result(out, name)
    assert found["code"] == code
    assert said in found["error"]
    assert not Path("/proc", str(result(out, "one")["pid"])).exists()


# --- a critic -------------------------------------------------------------------------------------


def test_ddp_trains_a_critic_as_one_process_does(out):
    one, two = states(out, "one dmd"), states(out, "ddp dmd")
    assert_close(one, two)
    for step, state in two.items():
        wanted = one[step]["networks"]["critic"]["weights"]
        for name, weight in state["networks"]["critic"]["weights"].items():
            assert (weight - wanted[name]).abs().max() <= 1e-6, (step, name)


def test_ddp_resumes_three_networks_bit_for_bit(out):
    straight, resumed = states(out, "ddp dmd"), states(out, "ddp dmd resumed")
    assert not differing({s: straight[s] for s in resumed}, resumed)
    assert not differing(states(out, "ddp dmd resumed", 1), resumed)
