"""Known effects: each says where it is from and its command, and has the report of that command."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.cli.command_line import parse
from sandbox.cli.jobs import check_and_wire
from sandbox.cli.multirun import jobs
from sandbox.config import discovery
from sandbox.config.paths import CHECKOUT, CONF
from tests.helpers import composed

EFFECTS = sorted(p.stem for p in CONF.glob("experiment/effects/*.yaml"))
REPORTS = CHECKOUT / "docs" / "effects"
each_effect = pytest.mark.parametrize("name", EFFECTS)
MEASURED = re.compile(r"[+-]?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")  # 0.12 [0.10, 0.14]
LARGEST = 300_000  # bytes of a file in the repository


@cache
def said(name: str) -> dict[str, str]:
    """What the comment at its head says: Effect, Source, Command, Number."""
    text = (CONF / f"experiment/effects/{name}.yaml").read_text()
    return dict(re.findall(r"^# (Effect|Source|Command|Number): (.+)$", text, re.MULTILINE))


@cache
def planned(name: str) -> list[list[str]]:
    """The jobs of its command, but for their seeds."""
    words = said(name)["Command"].rpartition("python run.py ")[2]
    line = parse(re.sub(r"\$\(.*?\)", str(REPORTS), words).split())  # a folder that is there
    seeds = [w for w in line.overrides if w.startswith("seeds=")]
    assert "--multirun" in line.flags and seeds and int(seeds[0].removeprefix("seeds=")) >= 3
    discovery.setup()
    return jobs([w for w in line.overrides if w not in seeds]) or []


def swept(name: str) -> list[dict[str, str]]:
    """The settings of each job that differ between jobs."""
    rows = [dict(w.split("=", 1) for w in job) for job in planned(name)]
    return [{k: v for k, v in row.items() if any(r[k] != v for r in rows)} for row in rows]


def typed(settings: dict[str, str]) -> dict[str, Any]:
    """1 is 1.0, and False false, as a sweep and a report write them."""
    return {name: yaml.safe_load(value) for name, value in settings.items()}


def report(name: str) -> dict[str, Any]:
    return json.loads((REPORTS / name / "report.json").read_text())


@each_effect
def test_an_effect_names_its_source_its_command_and_the_number_that_shows_it(name):
    found = said(name)
    assert [*found] == ["Effect", "Source", "Command", "Number"]
    assert re.search(r"\d{4}\.\d{5}|diffusers, examples/", found["Source"])
    assert f" experiment=effects/{name} " in found["Command"]
    assert any(metric in found["Number"] for metric in report(name)["metrics"])


@each_effect
def test_its_jobs_fit_together(name):
    """Its last one; the others differ from it in what is swept."""
    root = composed(*planned(name)[-1])
    assert root.recipe == f"effects_{name}"
    assert check_and_wire(root) is not None


@each_effect
def test_its_report_is_of_its_command(name):
    found = report(name)
    seeds = int(re.search(r"seeds=(\d+)", said(name)["Command"])[1])
    assert sorted(found["columns"]) == sorted(swept(name)[0])
    variants = [typed(v["settings"]) for v in found["variants"]]
    assert len(variants) == len(swept(name))
    assert [row for row in map(typed, swept(name)) if row not in variants] == []
    for variant in found["variants"]:
        assert [*variant["runs"]] == [str(seed) for seed in range(seeds)]
        assert all(run.startswith(f"effects_{name}-") for run in variant["runs"].values())


@each_effect
def test_its_report_is_small_and_shows_what_is_there(name):
    text = (REPORTS / name / "report.md").read_text()
    shown = re.findall(r"!\[\w+\]\((.+?)\)", text)
    assert len(shown) <= 1
    assert {p.name for p in (REPORTS / name).iterdir()} == {"report.md", "report.json", *shown}
    assert all(p.stat().st_size < LARGEST for p in (REPORTS / name).iterdir())


@each_effect
def test_the_numbers_of_the_overview_are_those_of_the_report(name):
    rows = (REPORTS / "README.md").read_text().splitlines()
    (row,) = (r for r in rows if f"]({name}/report.md)" in r)
    numbers = MEASURED.findall(row)
    text = (REPORTS / name / "report.md").read_text()
    assert len(numbers) >= 2
    assert [n for n in numbers if n not in text] == []
    assert said(name)["Command"] in (REPORTS / "README.md").read_text()


def test_every_report_has_an_effect():
    assert sorted(p.name for p in REPORTS.iterdir() if Path(p).is_dir()) == EFFECTS
