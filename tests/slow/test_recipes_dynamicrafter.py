"""DynamiCrafter's tiny recipes end to end: they train, sample, score, and sample from images.

One to three minutes of CPU time each, with the first stage, which all share: in these recipes the
clips of -1024 are as small as the others. CI trains -512-interp; the others are exhaustive.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
from PIL import Image

from sandbox import compose, sample, train
from sandbox.cli.jobs import perform
from sandbox.runs.run import Run

pytestmark = pytest.mark.slow
RECIPES = (
    pytest.param("dynamicrafter_512", marks=pytest.mark.exhaustive),
    "dynamicrafter_512_interp",
    pytest.param("dynamicrafter_1024", marks=pytest.mark.exhaustive),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tmp_path_factory, cache) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    words = (f"experiment={request.param}_tiny", "data=moving_digits_rates")
    root = compose(*words, "logger=null", "trainer.threads=1")
    return train(replace(root, out=str(out), cache=cache))


def test_it_learns_and_is_scored(run):
    losses = [m["loss"] for m in Run(run).metrics().values() if "loss" in m]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])  # measured 0.61
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert {"model", "real clips", "real through first stage"} <= scores.keys()
    assert scores["real through first stage"]["colour"] >= 0.9


def test_samples_and_checkpoints_are_saved_at_the_set_steps(run):
    """Samples every 200 micro-batches (two per step), checkpoints every 90 steps and at the end
    (only the newest is kept), weights alone every 100 steps.
    """
    assert {p.name for p in (run / "samples").glob("step_*")} == {"step_00000100"}
    kept = {p.stem for p in (run / "checkpoints").glob("*.ckpt")}
    assert kept == {"step_00000150"}
    weights = {p.name for p in (run / "weights").glob("step_*")}
    assert weights == {"step_00000100"}


def test_images_become_videos(run, tmp_path):
    names = [str(tmp_path / f"{name}.png") for name in ("start", "end")]
    for name, colour in zip(names, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 30), colour).save(name)
    words = [f"images=[{names[0]}]"]
    if "interp" in run.name:
        words.append(f"end_images=[{names[1]}]")
    root = compose("task=sample", f"run={run}", f"to={tmp_path}/to", "fps=12", *words,
                   "prompts=[a red 3 moving left,a red 4 moving up]")  # fmt: skip
    done = perform(root)
    assert done["captions"] == ["a red 3 moving left", "a red 4 moving up"]
    files = sorted(p.name for p in (tmp_path / "to").iterdir())
    clips = ["000-a-red-3-moving-left.mp4", "001-a-red-4-moving-up.mp4"]
    assert files == [*clips, "samples.json", "sheet.png"]
    with av.open(str(tmp_path / "to" / files[0])) as file:
        assert sum(1 for _ in file.decode(video=0)) == root.data.frames
        assert file.streams.video[0].average_rate == 8
    ends = names[1:] if "interp" in run.name else ()
    clips = sample(run, ["a red 3 moving left"], images=names[:1], end_images=ends, fps=12)
    assert clips.shape == (1, 3, root.data.frames, root.data.height, root.data.width)
