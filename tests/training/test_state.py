"""The training engine: what a step does, what it refuses, how it stops."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from lightning import Callback
from torch.nn.utils import clip_grad_norm_

from sandbox.config import registry
from sandbox.config.compatibility import first_stage_alone
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, Diverged, Preempted, StorageError
from sandbox.data.loader import Loader, batches
from sandbox.distributed.rank import Rank
from sandbox.model.ema import EMA
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.tasks.train import train
from sandbox.tasks.train_vae import train_vae
from sandbox.training.build import build_system
from sandbox.training.first_stage import train_first_stage
from sandbox.training.loop import Stream, fit
from tests.bad_files import largest_file
from tests.training_sessions import differing, record, session, small

EPOCHS = ("data.clips_per_epoch=13", "trainer.log_every=3", "checkpoint.every=5")


class At(Callback):
    """Does something when optimizer step `step` is done, or before each micro-batch."""

    def __init__(self, training, step, act):
        self.training, self.step, self.act = training, step, act

    def on_train_batch_end(self, *rest):
        if self.training.just_stepped and self.training.step == self.step:
            self.act()


def poisoned(call, sample=0, value=math.nan):
    """Makes the output of training pass number `call` (from 1) for one sample not finite."""

    def prepare(system):
        calls = []

        def hook(module, args, out):
            if module.training:
                calls.append(1)
            if not module.training or len(calls) != call:
                return out
            bad = torch.zeros(len(out), 1, 1, 1, 1)
            bad[sample] = value
            return out + bad

        system.backbone.register_forward_hook(hook)

    return prepare


def poisoned_gradient(step):
    """Makes one gradient of optimizer step `step` (from 1) not finite; its loss is finite."""

    def prepare(system):
        calls = []

        def hook(gradient):
            calls.append(1)
            return gradient * math.nan if len(calls) == step else gradient

        next(system.backbone.parameters()).register_hook(hook)

    return prepare


def steps_saved(out):
    return sorted(int(p.stem[5:13]) for p in out.glob("*/checkpoints/*.ckpt"))


def metrics(out):
    (path,) = out.glob("*/metrics.jsonl")
    return Run(path.parent).metrics()


# --- a step ---------------------------------------------------------------------------------------


def test_training_is_the_plain_loop(tmp_path):
    """Weights, average, losses, norms and rates against fifteen lines of torch, bit for bit."""
    root = small(*EPOCHS, "steps=8", "trainer.accumulate=2", "trainer.clip=0.5")
    states = record(root, tmp_path).states

    system = build_system(wire(replace(root, cache=str(tmp_path / "cache")))).train()
    named = [(n, p) for n, p in system.named_parameters() if p.requires_grad]
    optimizer = registry.create(root.optimizer).build(named, root.lr)
    rule = registry.create(root.ema)
    average = {n: p.detach().clone() for n, p in named}
    stream = iter(Stream(Loader(registry.create(root.data).split("train"), 2, root.seed)))
    for step in range(1, 9):
        optimizer.zero_grad()
        losses = []
        for batch in islice(stream, 2):
            losses.append(system.step(batch, system.draws(batch)).total)
            (losses[-1] / 2).backward()
        norm = clip_grad_norm_([p for _, p in named], 0.5)
        rate = root.lr_schedule.factor(step - 1, 8)
        for group in optimizer.param_groups:
            group["lr"] = root.lr * rate
        optimizer.step()
        for name, p in named:
            average[name].lerp_(p.detach(), 1 - rule.decay(step))
        found = metrics(tmp_path)[step]
        assert found["loss"] == torch.stack(losses).mean().item()
        assert found["grad_norm"] == norm.item()
        assert found["lr"] == root.lr * rate
        assert not differing(dict(system.trainable_state()), states[step]["weights"])
        assert not differing(average, states[step]["ema"]["average"])


def test_accumulation_is_a_larger_micro_batch(tmp_path):
    """Noise belongs to clips, not to micro-batches; only the order of sums differs (1e-6)."""
    few = record(small("steps=4", "data.batch_size=6", "data.clips_per_epoch=24"), tmp_path / "a")
    many = record(
        small("steps=4", "trainer.accumulate=3", "data.clips_per_epoch=24"), tmp_path / "b"
    )
    for step, state in few.states.items():
        for name, weight in state["weights"].items():
            other = many.states[step]["weights"][name]
            assert torch.allclose(weight, other, atol=1e-6, rtol=0), (step, name)


def test_a_learning_rate_of_zero_changes_nothing(tmp_path):
    root = small(*EPOCHS, "steps=7", "lr=0", "ema.decay=0.5")
    before = build_system(wire(root))
    state = record(root, tmp_path).states[7]
    assert not differing(dict(before.trainable_state()), state["weights"])
    for name, average in state["ema"]["average"].items():
        assert torch.equal(average, state["weights"][name]), name
    assert state["ema"]["updates"] == 7


def test_the_average_begins_with_the_first_weights_and_follows_the_rule(tmp_path):
    root = small(*EPOCHS, "steps=6", "ema.warmup=false", "ema.decay=0.8")
    first = dict(build_system(wire(root)).named_parameters())
    states = record(root, tmp_path).states
    for name, average in states[6]["ema"]["average"].items():
        expected = 0.8**6 * first[name].detach().double()
        for step, state in states.items():
            expected += 0.2 * 0.8 ** (6 - step) * state["weights"][name].double()
        # Six roundings of float32 against none.
        assert torch.allclose(average.double(), expected, atol=1e-6, rtol=0), name


def test_the_frozen_first_stage_stays_as_it_was_and_in_eval_mode(tmp_path):
    root = small(*EPOCHS, "steps=3", "vae=kl", "vae.weights=null", "vae.ch=8", "vae.dropout=0.5")
    with session(root, tmp_path) as training:
        before = training.system.frozen_hashes()
        fit(training)
        stage = training.system.first_stage
        assert not any(m.training for m in stage.modules())
        assert all(p.grad is None and not p.requires_grad for p in stage.parameters())
        training.system._fingerprints = None
        assert training.system.frozen_hashes() == before
        assert not any(k.startswith("first_stage") for k in training.state()["weights"])


def test_gradients_are_free_without_a_limit(tmp_path):
    free = record(small(*EPOCHS, "steps=2", "trainer.clip=null"), tmp_path / "a").states[2]
    loose = record(small(*EPOCHS, "steps=2", "trainer.clip=1e9"), tmp_path / "b").states[2]
    assert not differing(free["weights"], loose["weights"])
    assert metrics(tmp_path / "a")[2]["grad_norm"] > 0


def test_every_step_leaves_its_metrics(tmp_path):
    record(small(*EPOCHS, "steps=7", "trainer.log_every=5"), tmp_path)
    found = metrics(tmp_path)
    assert [*found] == list(range(1, 8))
    assert all({"loss", "grad_norm", "lr"} <= row.keys() for row in found.values())


def test_a_stream_has_no_last_batch_and_spans_epochs():
    items = registry.create(small(*EPOCHS).data).split("train")
    taken = [*islice(Stream(Loader(items, 2, 0)), 15)]
    assert [b.epoch for b in taken] == [0] * 7 + [1] * 7 + [2]
    assert [b.size for b in taken] == [2] * 6 + [1] + [2] * 6 + [1] + [2]
    assert len(Stream(Loader(items, 2, 0))) > 10**9


def test_repeated_micro_batches_come_in_turn_with_their_noise():
    items = registry.create(small(*EPOCHS).data).split("train")
    ids = [b.ids for b in islice(Stream(Loader(items, 2, 0)), 3)]
    taken = [*islice(Stream(Loader(items, 2, 0), repeat=3, first=4), 5)]
    assert [b.ids for b in taken] == [ids[1], ids[2], ids[0], ids[1], ids[2]]
    assert {b.epoch for b in taken} == {0}


def test_overfitting_makes_the_loss_fall(tmp_path):
    """One micro-batch, one noise, and a network wide enough to learn them by heart."""
    wide = ("backbone.width=64", "conditioning.width=64", "trainer=overfit")
    with session(small(*wide, "steps=60"), tmp_path) as training:
        fit(training)
    losses = [row["loss"] for row in metrics(tmp_path).values()]
    assert losses[-1] < 0.5 * losses[0]


def test_no_worker_is_left_after_training(tmp_path):
    others = {*multiprocessing.active_children()}
    with session(small("data.num_workers=2", "steps=3"), tmp_path) as training:
        fit(training)
        assert {*multiprocessing.active_children()} <= others
        assert len(next(iter(training.loader)).ids) == 2  # others are started where needed
        training.loader.close()
        assert {*multiprocessing.active_children()} <= others


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, value):
    root = small(*EPOCHS, "steps=9")
    with (
        pytest.raises(Diverged) as e,
        session(root, tmp_path, prepare=poisoned(7, sample=0, value=value)) as training,
    ):
        wanted = [*islice(Stream(deepcopy(training.loader)), 7)][-1].ids[0]
        fit(training)
    assert e.value.exit_code == 4
    assert str(e.value).startswith(f"step 7: loss={value}")
    assert f"samples with such a loss: {wanted}; lower lr=0.004" in str(e.value)
    assert steps_saved(tmp_path) == [5]
    assert [*metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_never_holds_the_step_that_went_wrong(tmp_path):
    root = small(*EPOCHS, "steps=9")
    with (
        pytest.raises(Diverged, match="step 5: loss=nan"),
        session(root, tmp_path, prepare=poisoned(5)) as training,
    ):
        fit(training)
    assert steps_saved(tmp_path) == []


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    root = small(*EPOCHS, "steps=9")
    with pytest.raises(Diverged, match="step 5: grad_norm=nan is not finite; samples of this"):
        record(root, tmp_path, prepare=poisoned_gradient(5))
    assert steps_saved(tmp_path) == []
    assert "NaN" not in next(tmp_path.glob("*/metrics.jsonl")).read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    root = small(*EPOCHS, "steps=9")
    with (
        pytest.raises(Diverged, match=r"step 5: not saved: .* state\.weights\."),
        session(root, tmp_path) as training,
    ):
        weight = next(p for p in training.system.parameters() if p.requires_grad)
        fit(training, [At(training, 5, lambda: weight.data.fill_(math.inf))])
    assert steps_saved(tmp_path) == []


def test_a_full_disk_during_a_write_in_the_background_ends_the_run(tmp_path):
    root = small(*EPOCHS, "steps=9", "checkpoint.every=2", "checkpoint.attempts=1")

    def fill(training, stack):
        training.writer.wait()  # the checkpoint before is whole
        stack.enter_context(largest_file(20_000))

    with (
        ExitStack() as stack,
        pytest.raises(StorageError, match=r"step 4 cannot be written .*earlier ones are intact"),
        session(root, tmp_path) as training,
    ):
        fit(training, [At(training, 3, lambda: fill(training, stack))])
    assert steps_saved(tmp_path) == [2]
    with session(root, tmp_path) as training:
        assert training.step == 2
        fit(training, [])
    assert steps_saved(tmp_path)[-1] == 9


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    root, go = small(*EPOCHS, "steps=9", "checkpoint.every=4"), threading.Event()
    write = checkpoint.save_and_prune
    monkeypatch.setattr(checkpoint, "save_and_prune", lambda *a: (go.wait(30), write(*a)))
    with session(root, tmp_path) as training:
        seen: list[list[int]] = []
        fit(training, [At(training, 7, lambda: (seen.append(steps_saved(tmp_path)), go.set()))])
    assert seen == [[]] and steps_saved(tmp_path)[-1] == 9


def skipping(*overrides, limit=10):
    policy = ("trainer.bad_step=skip", f"trainer.max_bad_steps={limit}")
    return small(*EPOCHS, *policy, *overrides)


@pytest.mark.parametrize("bad", [poisoned(4), poisoned_gradient(4)], ids=["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_neither_weights_nor_average_nor_optimizer(tmp_path, bad, optimizer):
    root = skipping("steps=6", f"optimizer={optimizer}")
    states = record(root, tmp_path, bad).states
    for part in ("weights", "ema"):
        assert not differing(states[3][part], states[4][part]), part
        assert differing(states[4][part], states[5][part]), part
    assert not differing(states[3]["optimizer"]["state"], states[4]["optimizer"]["state"])
    assert [s["step"] for s in states[6]["skipped"]] == [4]
    assert "train/" in states[6]["skipped"][0]["samples"]
    found = metrics(tmp_path)
    assert found[4]["skipped"] == 1
    assert [*found] == [1, 2, 3, 4, 5, 6]
    assert states[6]["loader"]["taken"] == 6


def test_under_fp16_a_gradient_may_overflow(tmp_path):
    """Its scaler passes over such a step and scales less; a loss must be finite all the same."""
    with session(small(*EPOCHS), tmp_path) as training:
        training.root = replace(training.root, precision="fp16")
        training.buffer.add(training.step, {"loss": 1.0, "grad_norm": math.inf})
        training.flush()
        training.buffer.add(training.step, {"loss": math.nan, "grad_norm": math.inf})
        with pytest.raises(Diverged, match="loss=nan"):
            training.flush()
    assert metrics(tmp_path) == {0: {"loss": 1.0}}


def test_more_skipped_steps_than_the_limit_end_the_run(tmp_path):
    def always(system):
        next(system.backbone.parameters()).register_hook(lambda g: g * math.nan)

    with pytest.raises(Diverged, match=r"3 steps had .* trainer.max_bad_steps=2: step 1 \(samp"):
        record(skipping("steps=6", limit=2), tmp_path, always)


# --- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_saves_it(tmp_path, number, capfd):
    root = small(*EPOCHS, "steps=9", "trainer.accumulate=2")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    class Sends(Callback):
        def on_train_batch_end(self, trainer, system, out, batch, index):
            if index == 4:  # in the middle of step 3
                os.kill(os.getpid(), number)

    with (
        pytest.raises(Preempted, match=f"stopped by {number.name} after step 3") as e,
        session(root, tmp_path) as training,
    ):
        fit(training, [Sends()])
    assert e.value.exit_code == 75
    assert steps_saved(tmp_path) == [3]
    assert [*metrics(tmp_path)] == [1, 2, 3]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert "Stopping after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), session(small("steps=9"), tmp_path) as training:
        fit(training, [At(training, 2, twice)])
    assert signal.getsignal(signal.SIGINT) == before
    assert steps_saved(tmp_path) == []


def test_a_signal_before_the_first_step_stops_without_one(tmp_path):
    class Early(Callback):
        def setup(self, *rest, **more):
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        pytest.raises(Preempted, match="before the first step"),
        session(small("steps=9"), tmp_path) as training,
    ):
        fit(training, [Early()])
    assert steps_saved(tmp_path) == []


# --- callbacks ------------------------------------------------------------------------------------

WATCHED = "callbacks=[val_loss,samples]"


def test_looking_at_a_run_does_not_change_it(tmp_path):
    often = ["callbacks.val_loss.every=2", "callbacks.samples.every=3", "callbacks.samples.count=2"]
    plain = record(small(*EPOCHS, "steps=6"), tmp_path / "a")
    watched = record(small(*EPOCHS, "steps=6", WATCHED, *often), tmp_path / "b")
    for part in ("weights", "ema", "optimizer", "loader"):
        assert not differing(plain.states[6][part], watched.states[6][part]), part


def test_validation_uses_the_same_noise_each_time_and_both_weights(tmp_path):
    root = small(*EPOCHS, "steps=6", "lr=0", "callbacks=[val_loss]", "callbacks.val_loss.every=2")
    record(root, tmp_path)
    found = {s: m for s, m in metrics(tmp_path).items() if "val/loss" in m}
    assert [*found] == [2, 4, 6]
    assert len({m["val/loss"] for m in found.values()}) == 1
    assert all(m["val/loss_ema"] == m["val/loss"] for m in found.values())


def test_validation_takes_the_requested_number_of_clips(tmp_path):
    with session(small(*EPOCHS), tmp_path) as training:
        system, items = training.system, registry.create(training.root.data).split("val")
        batch = next(batches(items, 5, training.root.seed))
        with torch.no_grad():
            expected = system.step(batch, system.draws(batch)).per_sample.mean().item()
        training.validate(5)
    assert metrics(tmp_path)[0]["val/loss"] == expected


def test_samples_of_a_run_are_those_of_the_sampling_task(tmp_path):
    """The files too, byte for byte."""
    from sandbox.cli.jobs import perform

    root = small(*EPOCHS, "steps=5", "callbacks=[samples]", "callbacks.samples.every=5")
    root = replace(root, callbacks={"samples": replace(root.callbacks["samples"], count=3)})
    recorder = record(root, tmp_path)
    (folder,) = (p.parent for p in tmp_path.glob("*/config.yaml"))
    (folder / "result.json").write_text("{}")
    task = registry.default("task", "sample")
    task = replace(task, run=str(folder), count=3, to=str(tmp_path / "again"))
    perform(replace(root, out=str(tmp_path), cache=str(tmp_path / "cache"), task=task))
    first = folder / "samples" / "step_00000005"
    names = sorted(p.name for p in first.iterdir())
    assert len(names) == 4  # three videos and the sheet
    again = {p.name for p in (tmp_path / "again").iterdir()}
    assert again == {*names, "samples.json"}
    assert json.loads((tmp_path / "again" / "samples.json").read_text())["step"] == 5
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert recorder.states[5]["ema"]["updates"] == 5


def test_what_callbacks_measure_is_recorded_before_the_checkpoint_of_their_step(tmp_path):
    """A run that is killed right after it would not measure again."""
    root = small(*EPOCHS, "steps=9", "callbacks=[val_loss]", "callbacks.val_loss.every=5")
    with (
        pytest.raises(Preempted),
        session(root, tmp_path) as training,
    ):
        training.rank.agree_to_stop = lambda: "a test" if training.step == 5 else None
        fit(training)
    assert "val/loss" in metrics(tmp_path)[5]


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path):
    """The loss falls from step to step at this rate, so the best are the last ones."""
    root = small(*EPOCHS, "steps=10", "lr=1e-2", "callbacks=[val_loss]",
                 "callbacks.val_loss.every=2", "checkpoint.every=2", "checkpoint.keep=1",
                 "checkpoint.best=2", "checkpoint.best_of=val/loss")  # fmt: skip
    record(root, tmp_path)
    measured = {s: m["val/loss"] for s, m in metrics(tmp_path).items() if "val/loss" in m}
    best = sorted(measured, key=measured.__getitem__)[:2]
    (folder,) = tmp_path.glob("*/checkpoints")
    kept = {checkpoint.manifest(p)["step"]: p for p in checkpoint.checkpoints(folder)}
    assert set(kept) == {*best, 10}
    for step, path in kept.items():
        assert checkpoint.manifest(path)["notes"]["val/loss"] == measured[step]


@pytest.mark.parametrize(
    ("task", "name"), [("train", "val/x"), ("train_vae", "val/x"), ("train_vae", "val/psnr")]
)
def test_a_metric_that_is_not_measured_is_an_error_which_lists_those_that_are(tmp_path, task, name):
    """Before a run folder is made; of a first stage, whose loss wants its output, at once.

    A first stage logs its psnr in training alone, where the lowest would not be the best.
    """
    root = small(*EPOCHS, "steps=9", "callbacks=[val_loss]", "callbacks.val_loss.every=9",
                 "checkpoint.every=9", "checkpoint.best=1", f"checkpoint.best_of={name}",
                 f"out={tmp_path}/out", f"task={task}", "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]",
                 "vae.weights=null")  # fmt: skip
    if task == "train_vae":
        root = first_stage_alone(replace(root, task=replace(root.task, batch_size=2)))
    run = {"root": to_container(root), "group": None, "overrides": []}
    other = "val/loss_ema" if task == "train" else "val/rec_loss_ema"
    with pytest.raises(ConfigError, match=rf"checkpoint\.best_of={name}: .*{other}"):
        (train if task == "train" else train_vae)(run, Rank())
    assert (tmp_path / "out").exists() == (task == "train_vae")
    assert not [*tmp_path.glob("*/*/metrics.jsonl")]


def test_a_first_stage_that_is_trained_for_a_run_needs_no_metric_of_the_system(tmp_path):
    root = small(*EPOCHS, "steps=2", "callbacks=[val_loss]", "callbacks.val_loss.every=2",
                 "loss=ldm", "schedule=ddpm", "checkpoint.every=2", "checkpoint.best=1",
                 "checkpoint.best_of=val/loss_simple", "vae=kl", "vae.ch=8",
                 "vae.ch_mult=[1,1]")  # fmt: skip
    inner = replace(root, callbacks={}, task=registry.default("task", "train_vae"))
    inner = replace(inner, task=replace(inner.task, batch_size=2, clips=2), out=str(tmp_path))
    assert train_first_stage(first_stage_alone(inner), None, Rank())["steps"] == 2


def test_weights_alone_are_written_beside_the_checkpoints(tmp_path):
    root = small(*EPOCHS, "steps=6", "checkpoint.every=4", "checkpoint.keep=1",
                 "checkpoint.weights_every=3")  # fmt: skip
    recorder = record(root, tmp_path)
    (folder,) = tmp_path.glob("*/weights")
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003", "step_00000006"]
    written = weight_files.read(folder / "step_00000006" / weight_files.LIVE)
    averaged = weight_files.read(folder / "step_00000006" / weight_files.AVERAGED)
    state = recorder.states[6]
    assert not differing(written, state["weights"])
    assert not differing({k: averaged[k] for k in state["ema"]["average"]}, state["ema"]["average"])
    assert len(checkpoint.checkpoints(folder.parent / "checkpoints")) == 1


def test_a_profile_is_written(tmp_path):
    root = small("steps=4", "callbacks=[profile]")
    profile = replace(root.callbacks["profile"], first=1, steps=2)
    record(replace(root, callbacks={"profile": profile}), tmp_path)
    (table,) = tmp_path.glob("*/profile.txt")
    assert "aten::" in table.read_text()
    assert json.loads(table.with_suffix(".json").read_text())["traceEvents"]


# --- settings of the machine ----------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_devices_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=cuda: this machine has no such"):
        record(small("trainer.accelerator=cuda"), tmp_path)
    with pytest.raises(ConfigError, match="precision=fp16 needs a CUDA device"):
        record(small("precision=fp16"), tmp_path)


def test_bf16_keeps_weights_and_average_in_float32(tmp_path):
    state = record(small("precision=bf16", "steps=2"), tmp_path).states[2]
    for tensor in (*state["weights"].values(), *state["ema"]["average"].values()):
        assert tensor.dtype == torch.float32
    assert all(math.isfinite(row["loss"]) for row in metrics(tmp_path).values())


def test_threads_come_from_the_settings_else_from_the_free_cores(tmp_path, monkeypatch):
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    found = []
    for said, overrides in (
        ("3", ["trainer.threads=2"]),
        ("3", ["trainer.threads=null"]),
        ("", ["trainer.threads=null", "data.num_workers=1"]),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        with session(small(*overrides), tmp_path / str(len(found))):
            found.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert found == [2, 3, max(1, cores - 1)]


def test_there_is_an_ema_only_if_it_is_configured(tmp_path):
    with session(small("ema=none"), tmp_path) as training:
        assert training.ema is None
        with training.ema_weights():
            pass
    with session(small(), tmp_path) as training:
        assert isinstance(training.ema, EMA)
        assert checkpoint.newest(training.run.checkpoints) is None
