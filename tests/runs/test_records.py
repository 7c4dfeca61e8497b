"""Files of a run folder that are read again: as they were written, or an error that names them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandbox import api
from sandbox.contracts import ConfigError, SandboxError, StorageError
from sandbox.reports import ablation_runs
from sandbox.runs import records
from sandbox.runs.diff import compare_runs
from sandbox.runs.lookup import find_run, read_root
from sandbox.runs.resume import open_root
from sandbox.runs.run import Run
from tests.bad_files import DAMAGES, snapshot
from tests.helpers import tiny

CAPTIONS = {"captions": ["a", "b"], "scores": {"colour": [0.5, 0.25]}}
METRICS = {"scores": {"model": {"colour": 0.375}}, "meaning": {"colour": "x"}, "cost": {}}
NAMES = ("config.yaml", "environment.json", "metrics.jsonl", "metrics.json", "scores_by_clip.json",
         "result.json", "evaluations/evaluation-01.json")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Two finished runs, "one" and "two"."""
    out = tmp_path_factory.mktemp("finished")
    for name in ("one", "two"):
        with open_root(tiny()) as run:
            pass
        run.folder.rename(out / name)
        run = Run(out / name)
        run.record_all([(1, {"loss": 2.5}), (2, {"loss": 1.5})])
        (run.folder / "evaluations").mkdir()
        records.write_dict(run.folder, "evaluations/evaluation-01.json", METRICS)
        records.write_dict(run.folder, "scores_by_clip.json", CAPTIONS)
        records.write_dict(run.folder, "metrics.json", METRICS)
        run.finish({"folder": str(run.folder), "loss": 1.5, "objective": 0.375})
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(finished, tmp_path) -> Path:
    subprocess.run(["cp", "-a", f"{finished}/.", str(tmp_path / "out")], check=True)
    return tmp_path / "out"


def another_digit(path: Path) -> None:
    """Content of the same form with another number."""
    text = path.read_text()
    for old, new in (("0.375", "0.875"), ("2.5", "3.5"), ("0.25", "0.75"), ("1.5", "7.5"),
                     ("steps: 2", "steps: 4"), ("cores", "chore")):  # fmt: skip
        text = text.replace(old, new)
    assert text != path.read_text()
    path.write_text(text)


READERS = {
    "task=sample": lambda out: read_root(out / "one"),
    "metrics": lambda out: Run(out / "one").metrics(),
    "scores of a notebook": lambda out: api.results(out / "one"),
    "task=diff": lambda out: str(compare_runs(out / "one", out / "two")),
    "result": lambda out: Run(out / "one").read("result.json"),
    "task=report": lambda out: [
        (e.metrics, e.result, e.by_prompt, e.settings) for e in ablation_runs.read(out).entries
    ],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [*DAMAGES, another_digit])
def test_a_damaged_file_is_named_and_never_another_number(out, name, damage, caplog):
    before = {what: read(out) for what, read in READERS.items()}
    damage(out / "one" / name)
    kept = snapshot(out)
    refused = []
    for what, read in READERS.items():
        try:
            found: Any = read(out)
        except SandboxError as e:
            assert name in str(e) and len(str(e)) < 500, e
            refused.append(what)
            continue
        if what == "task=report" and name in caplog.text:  # left out, and named
            assert found == before[what][1:]
            refused.append(what)
        else:
            assert found == before[what]
    assert refused
    assert snapshot(out) == kept


@pytest.mark.parametrize("damage", [*DAMAGES, another_digit])
def test_a_resume_of_a_run_with_a_damaged_config_is_refused(out, damage):
    root = tiny()
    root.resume.run, before = str(out / "one"), None
    try:
        damage(out / "one" / "config.yaml")
        before = snapshot(out)
        with pytest.raises(StorageError, match=r"config\.yaml"):
            open_root(root)
    finally:
        root.resume.run = None
    assert snapshot(out) == before


def test_a_damaged_run_does_not_hide_the_others(out, caplog):
    newest = max(out.glob("*/result.json"), key=lambda p: p.stat().st_mtime_ns).parent
    another_digit(newest / "config.yaml")
    assert find_run(str(out), None) != newest
    assert f"skipped run: {newest}" in caplog.text
    with pytest.raises(StorageError, match=r"config\.yaml: damaged or edited"):
        find_run(str(out), str(newest))


def test_a_secret_that_is_masked_on_the_way_to_the_disk_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    for name in ("environment.json", "a.json"):
        records.write_dict(tmp_path, name, {"note": "hf_verysecretvalue"})
    monkeypatch.delenv("HF_TOKEN")
    for name in ("environment.json", "a.json"):
        assert records.read_dict(tmp_path, name)["note"] != "hf_verysecretvalue"


def test_a_kill_between_the_hash_and_the_file_is_no_damage(tmp_path):
    records.write_dict(tmp_path, "a.json", {"n": 1})
    old = (tmp_path / "a.json").read_bytes()
    records.write_dict(tmp_path, "a.json", {"n": 2})
    (tmp_path / "a.json").write_bytes(old)
    assert records.read_dict(tmp_path, "a.json") == {"n": 1}


@pytest.mark.parametrize("found", ["{}", '{"hashes": 3}', '{"hashes": {"a.json": 3}}', None])
def test_files_without_a_hash_are_read_as_they_are(tmp_path, found):
    (tmp_path / "a.json").write_text('{"n": 1}')
    if found is not None:
        (tmp_path / "environment.json").write_text(found)
    assert records.read_dict(tmp_path, "a.json") == {"n": 1}
    assert records.read_dict(tmp_path, "b.json") == {}


@pytest.mark.parametrize("content", ["[]", "3", "{", "\x00", "[" * 100_000])
def test_a_file_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(StorageError, match=r"a\.json: damaged"):
        records.read_dict(tmp_path, "a.json")


@pytest.mark.parametrize("content", ["just text", "[1, 2]", "a: b: c", "a: [1", "\t- x", "!!set x"])
def test_a_config_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises((StorageError, ConfigError), match=r"config\.yaml: cannot be read"):
        Run(tmp_path).config()


def test_lines_of_metrics_that_are_none_are_skipped(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, [], 3, {"loss": 1}, {"step": "x"}, {"rewind": "y"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert Run(tmp_path).metrics() == {1: {"loss": 2.0}}
