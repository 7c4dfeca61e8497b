"""Two processes equal one: adapters, half precision, activation checkpointing, exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sandbox import api
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.runs.lookup import read_root
from sandbox.storage import checkpoint, weight_files
from tests.training_jobs import ONE, STEPS, TWO, assert_close, done, job, metrics, moved, states
from tests.training_sessions import differing

pytestmark = pytest.mark.slow

CHECKPOINTED = "backbone.gradient_checkpointing=true"
LORA = ("adapter=lora", "adapter.rank=4", CHECKPOINTED)
FULL = (CHECKPOINTED, "backbone.num_blocks=2")
# In half precision, a sum over four clips rounds once; two sums over two clips round twice.
HALVES = ("data.batch_size=2", "trainer.accumulate=2")
KINDS = {
    "full bf16": ((*FULL, "precision=bf16"), HALVES),
    "lora bf16": ((*LORA, "precision=bf16"), HALVES),
}
FP32 = {"full": (FULL, ONE), "lora": (LORA, ONE)}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    return done(out, [job("base", out, *ONE)])


def init_from(out):
    (base,) = (out / "base").glob("*")
    return f"init_from={base}"


def by_trainers(out, kinds):
    """Jobs of each kind: in one process, and in two processes with each trainer."""
    for kind, (overrides, one) in kinds.items():
        overrides = (*overrides, init_from(out)) if "lora" in kind else overrides
        yield job(f"{kind} one", out, *overrides, *one)
        yield job(f"{kind} ddp", out, *overrides, "trainer=ddp", *TWO)
        yield job(f"{kind} fsdp", out, *overrides, "trainer=fsdp2", *TWO)


@pytest.fixture(scope="module")
def half(out):
    return done(out, [*by_trainers(out, KINDS)])


@pytest.fixture(scope="module")
def single(out):
    return done(out, [*by_trainers(out, FP32)])


@pytest.fixture(scope="module")
def moves(out):
    stop = {"how": "asked", "rank": 0, "step": 3}
    lora, fsdp = (*LORA, init_from(out)), ("trainer=fsdp2", *TWO)
    jobs = [
        job("whole", out, *lora, *ONE),
        job("two", out, *lora, *fsdp, **stop),
        moved("two to one", out, "two", *lora, *ONE),
        job("one", out, *lora, *ONE, **stop),
        moved("one to two", out, "one", *lora, *fsdp),
    ]
    return done(out, jobs)


def assert_two_equal_one(out, kind, trainer):
    one, two = states(out, f"{kind} one"), states(out, f"{kind} {trainer}")
    assert sorted(two) == list(range(1, STEPS + 1))
    assert_close(one, two)
    assert differing(two[1]["weights"], two[STEPS]["weights"])
    rows, others = metrics(out, f"{kind} one"), metrics(out, f"{kind} {trainer}")
    for step in rows:
        for name in ("loss", "grad_norm"):
            assert rows[step][name] == pytest.approx(others[step][name], rel=2e-6), (step, name)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one_with_the_same_global_batch(half, kind, trainer):
    assert_two_equal_one(half, kind, trainer)


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", FP32)
def test_two_processes_equal_one_in_single_precision(single, kind, trainer):
    assert_two_equal_one(single, kind, trainer)


@pytest.mark.parametrize("trainer", ["one", "ddp", "fsdp"])
def test_an_adapter_and_its_ema_are_float32_on_a_half_precision_base(half, trainer):
    (folder,) = (half / f"lora bf16 {trainer}").glob("*")
    saved = checkpoint.load(checkpoint.newest(folder / "checkpoints"))
    assert saved["weights"].keys() == saved["ema"]["average"].keys()
    assert any(".lora_" in name for name in saved["weights"])
    assert not any(".base_layer." in name for name in saved["weights"])
    for part in (saved["weights"], saved["ema"]["average"]):
        assert {t.dtype for t in part.values()} == {torch.float32}
    system = api.build(folder)
    base = {p.dtype for n, p in system.backbone.named_parameters() if ".lora_" not in n}
    assert base == {torch.bfloat16}


@pytest.mark.parametrize("name", ["two to one", "one to two"])
def test_a_checkpoint_with_adapter_and_ema_resumes_with_another_number_of_processes(moves, name):
    found = states(moves, name)
    assert sorted(found) == [4, 5]
    assert_close(states(moves, "whole"), found)


@pytest.mark.parametrize("weights", ["live", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_a_sharded_run_has_full_weights(half, kind, weights, tmp_path):
    (folder,) = (half / f"{kind} fsdp").glob("*")
    to = tmp_path / "weights.safetensors"
    cfg = registry.default("task", "export")
    cfg = replace(cfg, run=str(folder), format="safetensors", weights=weights, to=str(to))
    registry.create(cfg)(wire(read_root(folder)))
    state = states(half, f"{kind} fsdp")[STEPS]
    expected = state["ema"]["average"] if weights == "ema" else state["weights"]
    found = weight_files.read(to)
    assert not differing(expected, {k: found[k] for k in expected})
