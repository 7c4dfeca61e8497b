"""DeepSpeed ZeRO on CPUs equals one process, and every trainer can read its checkpoints."""

from __future__ import annotations

import pytest
import torch

from sandbox.runs.run import Run
from tests.training_jobs import ONE, STEPS, TWO, assert_close, done, job, metrics, moved, states
from tests.training_sessions import differing

pytestmark = pytest.mark.slow

STAGES = [2, 3]
# Callbacks that read the weights between steps.
LOOKS = (
    "callbacks=[samples,val_loss]", "callbacks.samples.every=2", "callbacks.samples.count=1",
    "callbacks.val_loss.every=2", "callbacks.val_loss.clips=4",
)  # fmt: skip
COMMON = (
    "trainer.accumulate=2", "data.clips_per_epoch=48", *LOOKS,
    "trainable=[.,patch_out@0.1]",  # all weights, in two parameter groups
)  # fmt: skip
# In half precision, sums over another number of clips round differently.
HALF = (
    "precision=bf16", "backbone.gradient_checkpointing=true", "data.batch_size=2",
    "trainer.accumulate=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    jobs = [job("one", out, *ONE, *COMMON), job("half", out, *HALF)]
    for stage in STAGES:
        name = f"trainer=deepspeed_zero{stage}"
        zero, offload = (name, *TWO, *COMMON), (f"{name}_offload", *TWO, *COMMON)
        alone = (f"{name}_offload", "trainer.processes=1", *HALF)
        jobs += [
            job(f"zero {stage}", out, *zero, how="asked", rank=1, step=3),
            moved(f"zero {stage} to offload", out, f"zero {stage}", *offload),
            moved(f"zero {stage} to one", out, f"zero {stage}", *ONE, *COMMON),
            job(f"half {stage}", out, *alone),
        ]
    return done(out, jobs)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one_even_after_resuming_with_offload(out, stage):
    found = states(out, f"zero {stage}") | states(out, f"zero {stage} to offload")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert_close(states(out, "one"), found)
    one, two = metrics(out, "one"), Run(out / f"zero {stage} to offload").metrics()
    looked = ("val/loss", "val/loss_ema")
    for step in one:
        for name in ("loss", "grad_norm", "lr", *(looked if step in (2, 4) else ())):
            assert one[step][name] == pytest.approx(two[step][name], rel=2e-6), (step, name)
    sheets = (out / f"zero {stage} to offload" / "samples").glob("step_*/*.png")
    assert {sheet.parent.name for sheet in sheets} == {"step_00000002", "step_00000004"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_equals_that_of_another_trainer(out, stage):
    one, zero = states(out, "one")[3]["optimizer"], states(out, f"zero {stage}")[3]["optimizer"]
    assert not differing(one["param_groups"], zero["param_groups"])
    assert one["state"].keys() == zero["state"].keys()
    for number, moments in one["state"].items():
        assert moments.keys() == zero["state"][number].keys()
        for name, value in moments.items():
            atol = 1e-4 * value.abs().max().item()
            found = zero["state"][number][name]
            torch.testing.assert_close(value, found, rtol=0, atol=atol)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_in_one_process(out, stage):
    found = states(out, f"zero {stage} to one")
    assert sorted(found) == [4, 5]
    assert_close(states(out, "one"), found)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_with_offload_equals_one_without(out, stage):
    assert_close(states(out, "half"), states(out, f"half {stage}"))
    one, alone = metrics(out, "half"), metrics(out, f"half {stage}")
    for step in one:
        assert one[step]["loss"] == pytest.approx(alone[step]["loss"], rel=2e-6), step


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["", "_offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_on_a_gpu_it_equals_a_process_without_deepspeed(stage, offload, tmp_path):
    pytest.importorskip("deepspeed")
    on = ("trainer.accelerator=cuda", "data.batch_size=4")
    zero = (f"trainer=deepspeed_zero{stage}{offload}", "trainer.processes=1", *on)
    done(tmp_path, [job("one", tmp_path, *on), job("zero", tmp_path, *zero)])
    assert_close(states(tmp_path, "one"), states(tmp_path, "zero"))


PARTS = {
    "lora": ("adapter=lora", "adapter.rank=4", "precision=bf16", HALF[1]),
    "some": ("trainable=[blocks,patch_out@0.1]",),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Training of an adapter, and of some of the weights, in one process and in two."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("parts")
    done(out, [job("base", out, *ONE)])
    (base,) = (out / "base").glob("*")
    lora, some = (*PARTS["lora"], f"init_from={base}"), PARTS["some"]
    halves = ("data.batch_size=2", "trainer.accumulate=2")
    jobs = [job("lora", out, *lora, *halves), job("some", out, *some, *ONE)]
    for stage in STAGES:
        zero = (f"trainer=deepspeed_zero{stage}", *TWO)
        jobs += [job(f"lora {stage}", out, *lora, *zero), job(f"some {stage}", out, *some, *zero)]
    return done(out, jobs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_and_selected_weights_train_as_in_one_process(parts, stage, kind):
    one, two = states(parts, kind), states(parts, f"{kind} {stage}")
    assert sorted(two) == list(range(1, STEPS + 1))
    assert_close(one, two)
    assert differing(two[1]["weights"], two[STEPS]["weights"])
