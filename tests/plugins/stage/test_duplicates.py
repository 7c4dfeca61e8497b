"""stage=[duplicates]: finds exact and near copies, and keeps other clips."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from sandbox.config import discovery, registry
from sandbox.data.video_files import VideoClip, probe
from tests.raw_videos import precision_recall, scene, write

discovery.setup()


@pytest.fixture(scope="module")
def stage():
    return registry.create(registry.default("stage", "duplicates"))


def row_of(stage, path):
    info = probe(path)
    return {
        "id": path.name, "source": path.name, "info": info, "start": 0.0, "end": info.seconds,
        "scores": {"duplicates": stage.score(VideoClip(path, info))},
    }  # fmt: skip


def smaller(frames):
    return frames[:, ::2, ::2]


def brighter(frames):
    return (frames.astype(np.int16) + 8).clip(0, 255).astype(np.uint8)


def test_copies_are_dropped_and_other_clips_are_not(stage, tmp_path):
    want, rows = set(), []
    for seed in range(24):
        frames = scene(seed, 1, height=96, width=128)
        path = write(tmp_path / f"{seed:02}.mp4", frames)
        rows.append(row_of(stage, path))
        copy = tmp_path / f"{seed:02}-copy.mp4"
        if seed % 4 == 0:
            shutil.copy(path, copy)
        elif seed % 4 == 1:
            write(copy, frames, crf=28)
        elif seed % 4 == 2:
            write(copy, (smaller, brighter)[seed // 4 % 2](frames))
        if copy.exists():
            want.add(copy.name)
            rows.append(row_of(stage, copy))
    verdicts = stage.decide(rows)
    found = {row["id"] for row, s in zip(rows, verdicts, strict=True) if "drop" in s}
    precision, recall = precision_recall(want, found)
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, want ^ found)
    for row, verdict in zip(rows, verdicts, strict=True):
        if row["id"] in want & found:
            assert verdict["same_as"] == row["id"][:2] + ".mp4"


def test_the_copy_with_the_most_pixels_is_kept(stage, tmp_path):
    frames = scene(5, 1, height=96, width=128)
    paths = [write(tmp_path / "a.mp4", smaller(frames)), write(tmp_path / "b.mp4", frames)]
    assert ["drop" in s for s in stage.decide([row_of(stage, p) for p in paths])] == [True, False]


def test_the_same_shapes_in_other_colours_are_not_duplicates(stage, tmp_path):
    grey = scene(5, 1).mean(-1, keepdims=True)
    red, blue = ((grey * tint).astype(np.uint8) for tint in ((1, 0.5, 0.2), (0.2, 0.5, 1)))
    paths = [write(tmp_path / "a.mp4", red), write(tmp_path / "b.mp4", blue)]
    assert stage.decide([row_of(stage, p) for p in paths]) == [{}, {}]
