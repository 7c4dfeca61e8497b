"""A resumed run equals the uninterrupted one bit for bit, wherever it was stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import dropout

from sandbox.config.wiring import wire
from sandbox.contracts import Preempted, StorageError
from sandbox.runs.run import Run
from sandbox.storage import checkpoint
from sandbox.training.loop import fit
from tests.command import SMALL, folder_of, run_until, said
from tests.helpers import composed
from tests.training_sessions import differing, record, session, small, train_until

STEPS = 12
# 13 clips in micro-batches of two: 7 an epoch, of which the last has one clip.
SETTINGS = (
    "data.clips_per_epoch=13",
    f"steps={STEPS}",
    "checkpoint.every=5",
    "trainer.log_every=4",
)


def metrics(folder):
    return Run(folder).metrics()


def run_folder(out):
    (folder,) = (p.parent for p in out.glob("*/config.yaml"))
    return folder


def with_dropout(system):
    """A network with module dropout, which draws from torch's own generator."""
    system.backbone.register_forward_hook(lambda m, args, out: dropout(out, 0.3, m.training))


def chain(root, out, stops, prepare=None, workers=None):
    """Sessions that stop after each of `stops`, then one to the end; their last states by step."""
    states = {}
    for i, stop in enumerate([*stops, None]):
        now = root
        if workers:
            now = replace(root, data=replace(root.data, num_workers=workers[i % len(workers)]))
        states[stop or root.steps] = train_until(stop, now, out, prepare)
    return states


def assert_equal_runs(one, other, out):
    """`one` (uninterrupted) against the states and metrics of `other`."""
    for step, state in other.items():
        assert not differing(one.states[step], state), f"after step {step}"
    assert metrics(run_folder(out / "a")) == metrics(run_folder(out / "b"))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_stopping_after_every_single_step_changes_nothing(tmp_path, accumulate):
    root = small(*SETTINGS, f"trainer.accumulate={accumulate}")
    one = record(root, tmp_path / "a")
    other = chain(root, tmp_path / "b", range(1, STEPS + 1))
    assert_equal_runs(one, other, tmp_path)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_stopping_with_two_workers_changes_nothing(tmp_path, accumulate):
    root = small(*SETTINGS, f"trainer.accumulate={accumulate}", "data.num_workers=2")
    one = record(root, tmp_path / "a")
    other = chain(root, tmp_path / "b", [2, 3, 7, 9])  # 7: the end of an epoch, or the middle
    assert_equal_runs(one, other, tmp_path)


def test_another_number_of_workers_changes_nothing(tmp_path):
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a")
    other = chain(root, tmp_path / "b", [2, 7], workers=[2, 1, 0])
    assert_equal_runs(one, other, tmp_path)


def test_module_dropout_resumes_exactly(tmp_path):
    root = small(*SETTINGS, "trainer.accumulate=2")
    one = record(root, tmp_path / "a", with_dropout)
    other = chain(root, tmp_path / "b", [1, 4, 10], with_dropout)
    assert_equal_runs(one, other, tmp_path)
    plain = record(root, tmp_path / "c")
    assert differing(plain.states[STEPS]["weights"], one.states[STEPS]["weights"])


def test_an_ema_of_every_micro_batch_resumes_exactly(tmp_path):
    root = small(*SETTINGS, "trainer.accumulate=3", "ema.every=micro_batch")
    one = record(root, tmp_path / "a")
    assert one.states[STEPS]["ema"]["updates"] == 3 * STEPS
    assert_equal_runs(one, chain(root, tmp_path / "b", [3, 4, 8]), tmp_path)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_repeated_batches_resume_exactly(tmp_path, optimizer):
    root = small(*SETTINGS, "trainer=overfit", "trainer.repeat=3", f"optimizer={optimizer}")
    one = record(root, tmp_path / "a")
    assert_equal_runs(one, chain(root, tmp_path / "b", [2, 7]), tmp_path)


def test_a_run_without_ema_resumes(tmp_path):
    root = small(*SETTINGS, "ema=none")
    one = record(root, tmp_path / "a")
    assert one.states[STEPS]["ema"] is None
    assert_equal_runs(one, chain(root, tmp_path / "b", [6]), tmp_path)


def test_steps_after_the_last_checkpoint_are_made_again(tmp_path):
    """As after a kill: the newest checkpoint is older than what was recorded."""
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a")
    train_until(8, root, tmp_path / "b")
    folder = run_folder(tmp_path / "b")
    for path in folder.glob("checkpoints/step_00000008*"):
        path.unlink()
    assert max(metrics(folder)) == 8
    assert_equal_runs(one, {STEPS: train_until(None, root, tmp_path / "b")}, tmp_path)
    rewound = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"rewind": 5} in rewound


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path):
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a")
    train_until(3, root, tmp_path / "b")
    folder = run_folder(tmp_path / "b")
    for path in folder.glob("checkpoints/*"):
        path.unlink()
    assert_equal_runs(one, {STEPS: train_until(None, root, tmp_path / "b")}, tmp_path)


def test_a_broken_checkpoint_is_passed_over(tmp_path, caplog):
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a")
    train_until(8, root, tmp_path / "b")
    newest = checkpoint.newest(run_folder(tmp_path / "b") / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert_equal_runs(one, {STEPS: train_until(None, root, tmp_path / "b")}, tmp_path)
    assert newest.name in caplog.text


def test_a_finished_training_is_loaded_completely(tmp_path):
    """As after a kill between the last checkpoint and the result: `fit` has nothing to do."""
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a")
    train_until(None, root, tmp_path / "b")
    with session(root, tmp_path / "b") as training:
        assert training.step == STEPS
        fit(training)
        assert not differing(one.states[STEPS], training.state())
        with training.ema_weights():
            average = training.system.trainable_state()
            assert not differing(one.states[STEPS]["ema"]["average"], {**average})


def test_a_larger_number_of_steps_resumes_from_the_end(tmp_path):
    first = small(*SETTINGS, "lr_schedule=constant")
    train_until(None, first, tmp_path / "b")
    folder = run_folder(tmp_path / "b")
    longer = replace(first, steps=STEPS + 3, resume=replace(first.resume, run=str(folder)))
    one = record(replace(first, steps=STEPS + 3), tmp_path / "a")
    assert_equal_runs(one, {STEPS + 3: train_until(None, longer, tmp_path / "b")}, tmp_path)


def test_the_state_of_a_callback_is_restored(tmp_path):
    root = small(*SETTINGS, "callbacks=[val_loss]")
    train_until(4, root, tmp_path)

    def remembers(callback):
        callback.state_dict = lambda: {"seen": 7}
        callback.load_state_dict = lambda state: seen.append(state)

    seen = []
    with session(root, tmp_path) as training:
        remembers(training.callbacks["val_loss"])
        training.save()
        training.restore(training.state())
    assert seen == [{"seen": 7}]


def test_a_run_does_not_resume_with_another_first_stage(tmp_path):
    root = small(*SETTINGS)
    train_until(4, root, tmp_path)

    def other(system):
        system.first_stage.first.mean.add_(1)

    with pytest.raises(StorageError, match=r"first_stage: its weights .* are not those"):
        train_until(None, root, tmp_path, other)


def test_a_stopped_run_reports_where_it_resumes(tmp_path):
    root = small(*SETTINGS)
    with (
        pytest.raises(Preempted, match="after step 4, which is saved in") as e,
        session(root, tmp_path) as training,
    ):
        training.rank.agree_to_stop = lambda: "SIGTERM" if training.step == 4 else None
        fit(training)
    assert e.value.exit_code == 75
    newest = checkpoint.newest(run_folder(tmp_path) / "checkpoints")
    assert checkpoint.load(newest)["step"] == 4


def test_a_seed_gives_the_same_run_twice_and_another_seed_another(tmp_path):
    root = small(*SETTINGS)
    one, same = record(root, tmp_path / "a"), record(root, tmp_path / "b")
    other = record(replace(root, seed=1), tmp_path / "c")
    assert_equal_runs(one, same.states, tmp_path)
    assert differing(one.states[1]["weights"], other.states[1]["weights"])


def test_global_generators_have_no_say(tmp_path):
    root = small(*SETTINGS)
    one = record(root, tmp_path / "a", with_dropout)
    torch.manual_seed(12345)
    assert_equal_runs(one, record(root, tmp_path / "b", with_dropout).states, tmp_path)


def test_the_command_resumes_after_a_kill(tmp_path):
    """kill -9 of the real command; then the same settings in this process."""
    words = ("steps=24",)
    assert run_until(tmp_path, 10, signal.SIGKILL, *words) == -signal.SIGKILL, said(tmp_path)
    killed = folder_of(tmp_path)
    assert not Run(killed).finished
    root = wire(composed(*SMALL, *words, f"out={tmp_path}", f"cache={tmp_path}/cache")).root
    state = train_until(None, root, tmp_path)
    assert [p.parent for p in tmp_path.glob("*/config.yaml")] == [killed]
    one = record(root, tmp_path / "a")
    assert not differing(one.states[24], state)
    assert metrics(killed) == metrics(run_folder(tmp_path / "a"))
    assert len(metrics(killed)) == 24
