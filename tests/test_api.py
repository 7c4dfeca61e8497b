"""Notebooks get the same configurations and the same results as the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sandbox
from sandbox import api, build, compose, sample, train
from sandbox.api import clips, compare, curve, movie, results, sheet, sweep
from sandbox.contracts import ConfigError, StorageError
from sandbox.reports.ablation_page import tables
from sandbox.runs.lookup import read_root
from tests.helpers import TINY
from tests.training_sessions import differing

QUICK = (*TINY, "task.score_clips=2", "task.samples=1", "task.untrained=false")
CAPTIONS = ["a red 3 moving left", "a blue 7 moving up"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A sweep of two jobs."""
    return (*QUICK, "lr=1e-3,4e-3", f"out={tmp_path_factory.mktemp('api')}")


@pytest.fixture(scope="module")
def runs(words):
    """Its finished run folders."""
    return sweep(*words)


@pytest.fixture
def run(runs):
    return runs[0]


def test_the_names_of_the_readme_are_there():
    assert all(callable(getattr(sandbox, name)) for name in sandbox.__all__)
    assert {*sandbox.__all__} == {*api.__all__} - {"registry"}
    modules = {p.stem for p in Path(sandbox.__file__).parent.iterdir()}
    assert not modules & {*sandbox.__all__}  # `from sandbox import x` would give the module
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
    video = sample(run, CAPTIONS)
    assert video.shape == (2, 3, 9, 16, 16)
    assert video.abs().max() <= 1
    assert torch.equal(video, sample(build(run), CAPTIONS))
    assert not torch.equal(video, sample(run, CAPTIONS, steps=5))


def test_a_number_of_samples_is_of_the_datas_own_captions(run):
    first, second = sample(run, 3), sample(run, 3)
    assert first.shape == (3, 3, 9, 16, 16)
    assert torch.equal(first, second)


def test_a_folder_without_a_checkpoint_is_named(tmp_path, run):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(StorageError, match="no valid checkpoint"):
        build(tmp_path)


def test_a_task_on_an_earlier_run_has_that_runs_configuration(run):
    cfg = compose("task=sample", f"run={run}", "count=2", "sampler.steps=3")
    assert (cfg.task.run, cfg.task.count, cfg.sampler.steps) == (str(run), 2, 3)
    assert cfg.backbone == read_root(run).backbone
    assert len(list(train(cfg).glob("*.mp4"))) == 2


# --- sweeps and what runs recorded ----------------------------------------------------------------


def test_a_sweep_is_a_run_for_each_job_and_repeats_none(words, runs, capsys):
    assert [read_root(r).lr for r in runs] == [1e-3, 4e-3]
    assert sweep(*words) == runs
    said = "1 of 2: lr=0.001, done before\n2 of 2: lr=0.004, done before\n"
    assert capsys.readouterr().out == said


def test_runs_are_compared_by_their_folders_or_by_what_holds_them(runs):
    compared = compare(runs, ["lr=4e-3"], ["loss"])
    assert compared.baseline.settings == {"lr": "0.004"}
    scores = dict(tables(compared))["Scores"]
    assert [row[1] for row in scores] == ["lr", "0.001", "0.004"]
    assert "| lr " in compared._repr_markdown_()
    assert dict(tables(compare(runs[0].parent, ["lr=4e-3"], ["loss"])))["Scores"] == scores


def test_all_problems_of_a_sweep_are_told_before_a_run_starts(tmp_path):
    with pytest.raises(ConfigError) as e:
        sweep(*QUICK, "lr=-1,-2", f"out={tmp_path}")
    assert len(e.value.problems) == 2
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"python run\.py -m"):
        sweep("hydra/sweeper=optuna")


def test_a_run_has_its_curves_and_its_scores(run):
    steps, losses = curve(run)
    assert (steps == [1, 2]).all() and (losses > 0).all()
    with pytest.raises(ConfigError, match=r"no 'los'; want one of \[.*'loss'"):
        curve(run, "los")
    assert {"model", "real clips"} <= results(run).keys()
    assert 0 <= results(run)["model"]["colour"] <= 1
    with pytest.raises(ConfigError, match="it has no scores"):
        results(run / "samples")


def test_runs_that_never_finished_are_not_compared(tmp_path, run):
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(ConfigError, match="none of these is"):
        compare([tmp_path])


# --- clips ----------------------------------------------------------------------------------------


def test_clips_of_the_data_are_shown_as_strips_and_as_a_movie():
    batch = clips(compose(*TINY), 3)
    assert batch.video.shape == (3, 3, 9, 16, 16)
    assert batch.captions == clips(build(compose(*TINY)), 3).captions
    drawn = sheet(batch.captions[:2], real=batch.video, again_real=batch.video)
    assert drawn.width > drawn.height > 0
    film = movie(batch.captions, batch.video)
    assert film.gif.startswith(b"GIF89a")
    assert film._repr_html_().startswith('<img src="data:image/gif;base64,')
