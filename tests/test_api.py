"""Notebooks get the same configurations and the same results as the command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sandbox
from sandbox import build, compose, sample, train
from sandbox.contracts import ConfigError, StorageError
from sandbox.earlier import read_root
from tests.engine import differing
from tests.helpers import TINY

QUICK = (*TINY, "task.score_clips=2", "task.samples=1", "task.untrained=false")
CAPTIONS = ["a red 3 moving left", "a blue 7 moving up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run folder."""
    out = tmp_path_factory.mktemp("api")
    return train(replace(compose(*QUICK), out=str(out), cache=str(out / "cache")))


def test_the_names_of_the_readme_are_there():
    assert sorted(sandbox.__all__) == ["build", "compose", "sample", "train"]
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        sandbox.fit  # noqa: B018


def test_a_composed_configuration_is_typed_and_complete():
    root = compose("backbone.width=96", "steps=7")
    assert (root.steps, root.lr, root.backbone.width) == (7, 4e-3, 96)
    assert root.backbone.in_channels is not None


def test_all_problems_are_told_together():
    with pytest.raises(ConfigError) as e:
        compose("steps=0", "sampler.steps=-1", "backbone.width=0")
    assert len(e.value.problems) >= 3


def test_a_trained_run_is_finished(run):
    assert (run / "result.json").is_file()


def test_a_run_folder_gives_averaged_or_live_weights(run):
    averaged, live = build(run), build(str(run), weights="live")
    assert not averaged.training
    assert differing(averaged.trainable_state(), live.trainable_state())


def test_fresh_systems_of_one_seed_are_the_same():
    root = compose(*TINY)
    first, second = build(root), build(root)
    assert not differing(first.trainable_state(), second.trainable_state())
    other = build(replace(root, seed=1))
    assert differing(first.trainable_state(), other.trainable_state())


def test_samples_are_clips_and_the_same_each_time(run):
    clips = sample(run, CAPTIONS)
    assert clips.shape == (2, 3, 9, 16, 16)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, sample(build(run), CAPTIONS))
    assert not torch.equal(clips, sample(run, CAPTIONS, steps=5))


def test_a_folder_without_a_checkpoint_is_named(tmp_path, run):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(StorageError, match="no good checkpoint"):
        build(tmp_path)


def test_a_task_on_an_earlier_run_has_that_runs_configuration(run):
    cfg = compose("task=sample", f"run={run}", "count=2", "sampler.steps=3")
    assert (cfg.task.run, cfg.task.count, cfg.sampler.steps) == (str(run), 2, 3)
    assert cfg.backbone == read_root(run).backbone
    assert len(list(train(cfg).glob("*.mp4"))) == 2
