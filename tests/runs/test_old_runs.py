"""What an upgrade must not change, against a run folder that version 0.1 wrote.

`runs_of_0_1/` holds that run, stopped after two of four steps, and what the finished run recorded:
its losses, files and keys. Losses say that names of random draws and their order are unchanged.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sandbox
from sandbox.api import build, compose, train
from sandbox.cli.wandb_agent import translate_overrides
from sandbox.config.moved_modules import OLD_MODULES
from sandbox.contracts import MetricConfig, PluginError
from sandbox.registry import register
from sandbox.runs.lookup import read_root
from sandbox.runs.run import Run

HERE = Path(__file__).parents[1] / "runs_of_0_1"
RECORDED = json.loads((HERE / "recorded.json").read_text())
NAME = "default-57ed29db"  # the recipe and the hash of its configuration
OLD_IMPORTS = {  # what templates of `task=new` wrote into plugins and their tests, and trainers use
    "config": "to_container",
    "main": "perform",
    "parts": "build_parts",
    "randomness": "Keyed",
    "runs": "open_root open_run",
    "sharding": "total_norm whole",
    "training": "start fit",
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The run folder after the same command: it goes on from step 2 and finishes."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(HERE / NAME, folder / "outputs" / NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / train(compose(*RECORDED["overrides"]))


def keys(path: Path) -> list[str]:
    return sorted(json.loads(path.read_text()))


def test_the_same_command_resumes_the_run(resumed):
    assert resumed.name == NAME
    assert '{"rewind": 2}' in (resumed / "metrics.jsonl").read_text()
    losses = {str(step): found["loss"] for step, found in Run(resumed).metrics().items()}
    assert losses == pytest.approx(RECORDED["loss"], rel=1e-4)  # processors round differently


def test_files_and_keys_of_a_run_folder_are_as_they_were(resumed):
    found = {str(p.relative_to(resumed)) for p in resumed.rglob("*") if p.is_file()}
    assert found == {*RECORDED["files"]}
    assert keys(resumed / "result.json") == RECORDED["result"]
    assert keys(resumed / "metrics.json") == RECORDED["metrics"]
    assert sorted(json.loads((resumed / "metrics.json").read_text())["cost"]) == RECORDED["cost"]
    state = torch.load(resumed / "checkpoints" / "step_00000004.ckpt", weights_only=True)
    assert sorted(state) == RECORDED["checkpoint"]
    assert sorted(state["loader"]) == RECORDED["loader"]


def test_the_run_can_be_loaded_and_replayed(resumed):
    assert read_root(HERE / NAME).backbone.width == 8
    assert not build(resumed).training
    old = json.loads((HERE / NAME / "environment.json").read_text())["argv"][1:]
    assert compose(*old, f"out={resumed.parent}", "cache=outputs/cache").backbone.width == 8


def test_a_trial_of_an_old_wandb_sweep_composes(monkeypatch, tmp_path):
    """A trial of conf/sweep/components.yaml, as an agent hands it over."""
    words = ["sampler=euler", "backbone=unet3d", "schedule=ddpm", "trainer.clip=null", "seed=2"]
    monkeypatch.delenv("WANDB_SWEEP_PARAM_PATH", raising=False)
    root = compose(*translate_overrides(words))
    assert (root.backbone.plugin, root.trainer.clip) == ("backbone/unet3d", None)


@pytest.mark.parametrize(("old", "names"), OLD_IMPORTS.items())
def test_old_import_paths_work_and_name_the_new_ones(old, names):
    for name in names.split():
        with pytest.warns(
            DeprecationWarning, match=rf"sandbox\.{old}\.{name} is now sandbox\.\w+\."
        ):
            exec(f"from sandbox.{old} import {name}", {})


def test_a_plugin_with_a_method_under_its_former_name_is_refused():
    with pytest.raises(PluginError, match="metric/mine: rates is now called proportions"):

        @register("metric", "mine")
        class Mine:
            @dataclass
            class Config(MetricConfig):
                pass

            def rates(self) -> frozenset[str]:
                return frozenset()


def test_every_old_module_is_found():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # importing a module alone does not warn
        for old in OLD_MODULES:
            exec(f"import sandbox.{old}", {})
    assert sandbox.__name__ == "sandbox"
