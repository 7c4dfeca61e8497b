"""Requests of the page of task=ui: what they may name, and the errors they get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sandbox.config import composition, discovery
from sandbox.config.root import to_container, to_root
from sandbox.contracts import ConfigError
from sandbox.ui.page import not_usable
from sandbox.ui.requests import Request, Runs, captions_of, quoted
from tests.training_sessions import small

TEXTS = ["a red 3", "it's", 'say "no"', "a, b]", "a=b", "${oc.env:HOME}", "back\\slash", "tail\\",
         "\\${seed}", "$5 {now}", "#1; (two)", "", "null", "1e3"]  # fmt: skip


@pytest.fixture
def runs(tmp_path) -> Runs:
    """A folder with a link that leads out of it."""
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("config.yaml", "report.html"):
        (tmp_path / "elsewhere" / name).write_text("task: null\n")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    return Runs(tmp_path / "runs")


@pytest.mark.parametrize("name", ["..", "../elsewhere", "/etc", "link", "one/../../x", "a\0b"])
def test_nothing_outside_the_folder_has_a_name(runs, name):
    with pytest.raises(ConfigError, match="not in the folder of runs"):
        runs.resolve(name)
    with pytest.raises(ConfigError, match="not in the folder of runs"):
        runs.report(f"{name}/report.html")


def test_links_that_lead_out_are_not_listed(runs):
    assert runs.names() == []
    assert runs.pages() == []


def run_of(runs: Runs, name: str, config: str) -> None:
    """A run folder with a checkpoint."""
    (runs.folder / name / "checkpoints").mkdir(parents=True)
    (runs.folder / name / "config.yaml").write_text(config)
    for ending in ("ckpt", "json"):
        (runs.folder / name / "checkpoints" / f"step_00000001.{ending}").touch()


def test_a_run_that_cannot_be_read_is_named_with_its_reason(runs):
    run_of(runs, "damaged", "task: [")
    lost = to_container(small()) | {"vae": {"plugin": "vae/lost"}}
    run_of(runs, "lost", yaml.safe_dump(lost))
    run_of(runs, "good", yaml.safe_dump(to_container(small())))
    for name, age in (("good", 9), ("lost", 5), ("damaged", 1)):
        os.utime(runs.folder / name / "config.yaml", (2e9 - age, 2e9 - age))
    names = runs.names()
    assert names == ["lost", "good"] and [*runs.unusable] == ["damaged"]
    assert runs.readable(names, None) == ["good"]
    assert "vae=lost" in runs.unusable["lost"] and "config.yaml" in runs.unusable["damaged"]
    assert all(name in not_usable(runs) for name in ("damaged", "lost"))


@pytest.mark.parametrize("name", ["", None, "one", ".", "two", "one@x"])
def test_an_unknown_run_is_an_error_that_lists_the_runs(runs, name):
    with pytest.raises(ConfigError, match="no such run; available: none in"):
        runs.resolve(name)


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_comes_back_as_it_was(text):
    discovery.setup()
    words = ["task=sample", f"task.prompts=[{quoted(text)}]"]
    root = to_root(composition.compose(words))
    assert [*root.task.prompts] == [text]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"sampler": "../x"}, "sampler='../x': want one of"),
        ({"numbers": {"seed": "${oc.env:HOME}"}}, "seed='${oc.env:HOME}': want an integer, or"),
        ({"numbers": {"sampler.steps": "2.5"}}, "sampler.steps='2.5': want an integer, or blank"),
        ({"numbers": {"guidance.guidance_scale": "x"}}, "want a number, or blank"),
        ({"prompts": ("a",) * 33}, "33 prompts"),
    ],
)
def test_a_request_holds_only_choices_and_numbers(named, problem):
    with pytest.raises(ConfigError) as e:
        Request("one", **named).overrides()
    assert problem in str(e.value)


def test_a_line_is_a_prompt():
    assert captions_of(" a red 3 \n\nb\n") == ("a red 3", "b")
    assert captions_of(None) == ()


def test_a_run_folder_is_named_by_its_own_name(runs, tmp_path: Path):
    (tmp_path / "runs" / "one" / "config.yaml").write_text("task: null\n")
    assert runs.resolve("one@12") == ((tmp_path / "runs" / "one").resolve(), 12)
