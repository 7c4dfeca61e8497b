"""The full default run from the command line: scores, pages, records (80 s of CPU per seed)."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from sandbox.config.discovery import setup
from sandbox.config.root import from_container, to_container
from sandbox.config.wiring import wire
from sandbox.runs.lookup import read_root
from sandbox.runs.run import Run

CHECKOUT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module", params=[0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2))]
)
def folder(request, tmp_path_factory) -> Path:
    """The folder of a run with this seed."""
    out = tmp_path_factory.mktemp(f"seed_{request.param}")
    words = [f"seed={request.param}", f"out={out}", f"cache={out}/cache", "logger=null"]
    subprocess.run([sys.executable, "run.py", *words], cwd=CHECKOUT, check=True)
    (path,) = out.glob("*/metrics.json")
    return path.parent


@pytest.fixture
def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def scores(metrics) -> dict:
    """Rows of scores, on all 192 clips of unseen captions."""
    assert metrics["clips"] == 192
    return metrics["scores"]


# --- scores ---------------------------------------------------------------------------------------


def test_clips_have_the_direction_and_colour_of_their_captions(scores):
    assert scores["model"]["direction"] >= 0.95
    assert scores["model"]["colour"] >= 0.95


def test_digits_keep_their_shape_and_speed(scores):
    assert scores["model"]["shape"] >= 0.40
    assert 0.9 <= scores["model"]["speed"] <= 1.1


def test_clips_of_one_caption_are_as_diverse_as_real_ones(scores):
    assert 0.15 <= scores["model"]["diversity"] <= 0.33
    assert scores["mean clip"]["diversity"] == 0


def test_an_untrained_model_scores_near_chance(scores):
    assert scores["untrained model"]["direction"] <= 0.15
    assert scores["untrained model"]["colour"] <= 0.40


def test_scores_are_compared_with_real_clips_and_a_blurred_mean(scores, metrics):
    for score in ("direction", "colour"):
        assert scores["real clips"][score] == scores["mean clip"][score] == 1
    assert scores["real clips"]["digit"] > 0.9
    assert scores["mean clip"]["digit"] < 0.3
    assert 23 < metrics["first_stage_psnr_db"] < 26


def test_the_loss_falls(folder):
    losses = [m["loss"] for m in Run(folder).metrics().values()]
    assert len(losses) == Run(folder).config()["steps"]
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_memory_stays_below_three_gib(scores):
    """Peak of the largest child process so far."""
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20  # KiB


# --- files ----------------------------------------------------------------------------------------


def test_the_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))", page)  # parts of a figure
    assert "<script src" not in page
    assert page.count("data:video/mp4;base64,") == 12
    assert page.count("data:image/png;base64,") >= 1
    assert len(page) < 16 * 2**20
    assert "direction" in page and "loss" in page


def test_every_video_can_be_read(folder):
    videos = sorted((folder / "samples").glob("*.mp4"))
    assert len(videos) == 12
    for path in videos:
        with av.open(str(path)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == 9
        assert frames[0].shape[0] == frames[0].shape[1] >= 64
        assert frames[4].max() > 100  # ink


def test_the_sheet_can_be_read(folder):
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 200 and sheet.height > 200
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 100


def test_the_recorded_configuration_is_complete(folder):
    """It wires unchanged, and no setting is left to a default."""
    setup()
    root = read_root(folder)
    assert to_container(wire(root).root) == to_container(root)
    recorded = Run(folder).config()
    assert to_container(from_container(recorded)) == recorded
    assert recorded["lr"] == 4e-3
    assert recorded["backbone"]["in_channels"] == 32


def test_the_result_names_folder_steps_and_objective(folder, metrics):
    result = json.loads((folder / "result.json").read_text())
    assert result["folder"] == str(folder)
    assert result["steps"] == Run(folder).config()["steps"]
    assert result["scores"] == metrics["scores"]["model"]
    assert result["objective"] == result["scores"]["direction"]


def test_the_environment_is_recorded(folder):
    found = json.loads((folder / "environment.json").read_text())
    assert found["versions"]["torch"] and found["python"] and found["hardware"]["cores"]
