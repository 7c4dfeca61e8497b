"""The sweep files that come with the sandbox: W&B takes them, and every trial composes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sandbox import compose

FILES = sorted((Path(__file__).parents[2] / "conf" / "sweep").glob("*.yaml"))


def ends(parameter: dict) -> list[object]:
    """Its values, or both ends of its range."""
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_trial_of_a_sweep_file_composes(file):
    sweep = yaml.safe_load(file.read_text())
    fixed = [w for w in sweep["command"] if not w.startswith("${")]
    parameters = sweep["parameters"]
    values = [ends(p) for p in parameters.values()]
    for turn in range(max(map(len, values))):  # each value once
        chosen = [v[turn % len(v)] for v in values]
        words = [f"{k}={v}" for k, v in zip(parameters, chosen, strict=True)]
        assert compose(*fixed, *words).lr


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_agent_starts_trials_without_hyphens(file):
    command = yaml.safe_load(file.read_text())["command"]
    assert command[:3] == ["${env}", "${interpreter}", "${program}"]
    assert command[-1] == "${args_no_hyphens}"
