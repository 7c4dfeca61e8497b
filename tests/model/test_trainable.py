"""trainable=: chosen weights train at their own rates; the others are frozen, and saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sandbox.config.param_groups import lr_factors
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run
from sandbox.storage import weight_files
from sandbox.tasks.train import train
from sandbox.training.build import build_system, check_weights, load_system
from sandbox.training.first_stage import train_first_stage
from sandbox.weights.init_from import init_from
from tests.helpers import composed
from tests.training_sessions import differing, record, session, small, train_until

NAMES = ("backbone.blocks.0.attn.weight", "backbone.blocks.1.attn.weight", "backbone.out.bias")
CHOSEN = r"trainable=[blocks,'patch_out@0.1']"


@pytest.mark.parametrize(
    ("entries", "want"),
    [
        (["attn"], (1, 1, 0)),
        (["blocks.1", "out@0.1"], (0, 1, 0.1)),
        ([".", "blocks@0.5", "blocks.1@0"], (0.5, 0, 1)),  # the last that matches counts
        ([r"attn\.weight$"], (1, 1, 0)),
    ],
)
def test_patterns_choose_weights_and_their_rates(entries, want):
    assert tuple(lr_factors(NAMES, entries).values()) == want


def test_every_entry_that_matches_nothing_is_named_with_the_nearest_name():
    with pytest.raises(ConfigError) as raised:
        lr_factors(NAMES, ["atn", "blocks", "nothing@0.1"])
    first, second = raised.value.problems
    assert first.startswith("trainable[0]='atn': matches no") and "'attn'" in first
    assert second.startswith("trainable[2]='nothing@0.1'")


def test_holding_everything_still_is_refused():
    with pytest.raises(ConfigError, match="freezes every parameter"):
        lr_factors(NAMES, ["blocks@0"])


@pytest.mark.parametrize("entry", ["attn@fast", "attn@-1", "(", "@0.1", "attn@inf"])
def test_an_entry_that_cannot_be_read_is_a_configuration_error(entry):
    with pytest.raises(ConfigError, match=r"trainable\[1\]=.*want a regular expression"):
        wire(replace(small(), trainable=("blocks", entry)))


def test_names_are_looked_for_before_a_run_folder_is_made(tmp_path):
    root = composed("trainable=[blocs]", f"out={tmp_path}", "logger=null", "vae.weights=null")
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        check_weights(wire(root))
    with pytest.raises(ConfigError, match="did you mean 'blocks'"):
        train({"root": to_container(root), "group": None, "overrides": []}, Rank())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=["adamw", "muon"])
def trained(request, tmp_path_factory):
    """Two steps with the blocks at lr and the output at a tenth of it; states by step."""
    root = small(CHOSEN, f"optimizer={request.param}", "lr_schedule=constant",
                 "lr_schedule.warmup=0", "steps=2")  # fmt: skip
    out = tmp_path_factory.mktemp("run")
    with session(root, out) as training:
        start = {k: v.clone() for k, v in training.system.trainable_state().items()}
    return root, start, record(root, out), out


def test_only_chosen_weights_move_and_all_are_in_checkpoints(trained):
    _, start, recorder, _ = trained
    end = recorder.states[2]["weights"]
    assert end.keys() == start.keys()
    moved = {k for k in end if not torch.equal(end[k], start[k])}
    chosen = {k for k in end if "blocks" in k or "patch_out" in k}
    assert moved and moved <= chosen
    assert chosen < end.keys()


def test_frozen_weights_have_no_ema_and_no_optimizer_state(trained):
    _, _, recorder, _ = trained
    state = recorder.states[2]
    chosen = [k for k in state["weights"] if "blocks" in k or "patch_out" in k]
    assert sorted(state["ema"]["average"]) == sorted(chosen)
    assert len(state["optimizer"]["state"]) == len(chosen)


def test_groups_have_their_own_learning_rates_which_are_logged(trained):
    root, _, recorder, out = trained
    optimizer, lr = recorder.training.optimizer, root.lr
    named = {id(p): n for n, p in recorder.training.system.named_parameters()}
    for group in optimizer.param_groups:
        factor = 5.0 if group.get("muon") else 1.0
        slow = "patch_out" in named[id(group["params"][0])]
        assert group["lr"] == pytest.approx(lr * factor * (0.1 if slow else 1))
    (folder,) = (p.parent for p in out.glob("*/config.yaml"))
    row = Run(folder).metrics()[2]
    assert (row["lr"], row["lr/patch_out"]) == (pytest.approx(lr), pytest.approx(lr / 10))


def test_a_stopped_run_resumes_bit_for_bit(trained, tmp_path):
    root, _, recorder, _ = trained
    train_until(1, root, tmp_path)
    assert not differing(train_until(None, root, tmp_path), recorder.states[2])


def test_a_run_is_sampled_from_with_all_its_weights(trained):
    _, _, recorder, out = trained
    (folder,) = (p.parent for p in out.glob("*/config.yaml"))
    own = load_system(folder, "live").trainable_state()
    assert not differing({**own}, recorder.states[2]["weights"])


def test_a_next_stage_starts_from_all_weights_and_trains_others(trained):
    _, _, recorder, out = trained
    (folder,) = (p.parent for p in out.glob("*/config.yaml"))
    root = small("trainable=[modulation]")
    system = build_system(wire(root))
    init_from(system, folder)
    ends = recorder.states[2]
    assert not differing({**system.trainable_state()}, ends["weights"] | ends["ema"]["average"])


def test_another_selection_does_not_take_the_optimizers_state(tmp_path):
    train_until(1, small(CHOSEN, "ema=none"), tmp_path)
    (folder,) = (p.parent for p in tmp_path.glob("*/config.yaml"))
    other = small("trainable=[blocks]", "ema=none", f"resume.run={folder}",
                  "resume.allow=[trainable]")  # fmt: skip
    with pytest.raises(StorageError, match="`trainable`, optimizer or network differ"):
        train_until(None, other, tmp_path)


def test_a_decoder_trains_alone(tmp_path):
    """The encoder stays as it is, and in eval mode; the file of the first stage has both."""
    words = (
        "task=train_vae", "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]", "logger=null", "steps=2",
        "data.clips_per_epoch=8", "task.clips=2", "task.shown=1", "task.batch_size=2",
        "trainer.threads=1", f"out={tmp_path}", "vae.weights=null", "ema=none",
    )  # fmt: skip
    first = train_first_stage(wire(composed(*words)).root, None, Rank())
    more = (*words, f"init_from={first['folder']}", "trainable=[decoder,post_quant_conv]")
    second = train_first_stage(wire(composed(*more)).root, None, Rank())
    before, after = (
        weight_files.read(Path(run["folder"]) / "first_stage.safetensors")
        for run in (first, second)
    )
    changed = {k for k in before if not torch.equal(before[k], after[k])} - {"shift", "scale"}
    trained = {k for k in before if k.startswith(("decoder", "post_quant_conv"))}
    assert changed and changed <= trained
    with pytest.raises(ConfigError, match=r"trainable\[0\]='backbone'"):
        train_first_stage(wire(composed(*words, "trainable=[backbone]")).root, None, Rank())


def test_completely_frozen_modules_stay_in_eval_mode():
    system = build_system(wire(small("trainable=[backbone.blocks]")))
    system.train()
    assert system.backbone.training and system.backbone.blocks[0].training
    assert not system.backbone.patch_in.training and not system.conditioner.training
