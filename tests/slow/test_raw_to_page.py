"""The end-to-end example, docs/examples/raw_to_page.py, from raw videos to the sampling page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import pytest

from tests.command import CHECKOUT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """The output folder and the console output of the script."""
    out = tmp_path_factory.mktemp("raw_to_page")
    words = [sys.executable, "docs/examples/raw_to_page.py", f"--out={out}", "--steps=10"]
    ran = subprocess.run(
        words, cwd=CHECKOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return out, ran.stdout


def test_scenes_are_kept_and_unusable_clips_are_dropped(done):
    lines = (done[0] / "prepared" / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    by = Counter(row["dropped_by"] for row in rows)
    assert by == {None: 24, "motion": 1, "duplicates": 2, "unreadable": 1}
    for row in (row for row in rows if row["kept"]):
        colour, way = Path(row["source"]).stem.split("_")
        assert row["caption"] == f"a {colour} wall moving {way}"


def test_every_kept_clip_is_encoded_with_its_caption(done):
    splits = json.loads((done[0] / "latents" / "index.json").read_text())["splits"]
    assert sum(map(len, splits.values())) == 24
    assert len({row["caption"] for rows in splits.values() for row in rows}) == 12
    assert not {r["caption"] for r in splits["train"]} & {r["caption"] for r in splits["val"]}


def test_two_runs_are_trained_sampled_and_compared(done):
    runs = sorted(path.parent for path in done[0].glob("runs/*/result.json"))
    assert len(runs) == 2
    (clip,) = runs[0].glob("samples/prompts/000-a-red-wall-moving-left.mp4")
    with av.open(str(clip)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
    table = (done[0] / "runs" / "report" / "report.md").read_text()
    assert "0.001" in table and "0.004" in table


def test_the_page_returns_clips_of_both_runs_and_their_report(done):
    assert "answers with 4 clips" in done[1]
    assert done[1].count("run.py task=sample run=") == 3  # one is a step of the script
    assert "its report has " in done[1]
