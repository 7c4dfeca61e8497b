"""Parameters as an agent of a W&B sweep writes them."""

from __future__ import annotations

import pytest
import yaml

from sandbox import compose
from sandbox.cli.wandb_agent import PARAMETERS, translate_overrides


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """Leaves a trial's parameters as an agent does, and gives the words that it would say."""

    def says(**parameters):
        path = tmp_path / "config-trial.yaml"
        node = {name: {"value": value} for name, value in parameters.items()}
        path.write_text(yaml.safe_dump(sort_keys=False, data={"wandb_version": 1, **node}))
        monkeypatch.setenv(PARAMETERS, str(path))
        return [f"{name}={value}" for name, value in parameters.items()]

    return says


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("trainer.clip", None, ["trainer.clip=null"]),
        ("backbone", {"width": 8, "patch": None}, ["backbone.width=8", "backbone.patch=null"]),
        ("x", {"a": 1, "b": {"c": True}}, ["x={a:1,b:{c:true}}"]),
        ("optimizer.betas", [0.9, 0.99], ["optimizer.betas=[0.9,0.99]"]),
        ("x", ["it's", None], ['x=["it\'s",null]']),
        ("backbone", "dit", ["backbone=dit"]),
        ("x", "None", ["x=None"]),  # the word, as the sweep has it
        ("lr", 1e-5, ["lr=1e-05"]),
    ],
)
def test_what_an_agent_says_is_understood(agent, name, value, words):
    assert translate_overrides(agent(**{name: value})) == words


def test_a_trial_with_none_and_a_dictionary_composes(agent):
    root = compose(*translate_overrides(agent(**{"trainer.clip": None, "backbone": {"width": 64}})))
    assert root.trainer.clip is None and root.backbone.width == 64


def test_words_of_all_trials_and_those_without_an_agent_stay(agent, monkeypatch):
    agent(lr=None)
    assert translate_overrides(["steps=3", "x=None"]) == ["steps=3", "x=None"]
    monkeypatch.delenv(PARAMETERS)
    assert translate_overrides(["lr=None"]) == ["lr=None"]
