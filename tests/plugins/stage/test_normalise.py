"""stage=[normalise]: clips are upright, with even sides and a constant frame rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sandbox.config import discovery, registry
from sandbox.contracts import VideoFile
from sandbox.data.video_files import VideoClip, probe
from tests.raw_videos import scene, write_strange

discovery.setup()


def stage_of(**settings):
    return registry.create(replace(registry.default("stage", "normalise"), **settings))


def rendered(path, **settings) -> np.ndarray:
    return np.stack(list(stage_of(**settings).render(VideoClip(path, probe(path))).frames))


def difference(a, b) -> float:
    return float(np.abs(a.astype(np.float32) - b).mean())


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_video_is_upright(rotation, tmp_path):
    frames = scene(1, 0.5)
    turned = np.rot90(frames, -rotation // 90, (1, 2))
    info = probe(path := write_strange(tmp_path / "a.mp4", turned, rotation=rotation))
    found = rendered(path)
    assert (info.height, info.width) == found.shape[1:3] == frames.shape[1:3]
    assert difference(found, frames) < 8  # of 255: chroma at half size, and h264


def test_frames_of_a_variable_rate_are_held(tmp_path):
    frames = scene(2, 0.6, (6, 0))
    path = write_strange(tmp_path / "a.mp4", frames, [0, 100, 500, 550, 600, 900])
    found = rendered(path, fps=10.0)
    want = frames[[0, 1, 1, 1, 1, 2, 4, 4, 4, 5]]
    assert probe(path).variable
    assert difference(found[: len(want)], want) < 8
    assert abs(len(found) - len(want)) <= 1  # the duration of the last frame is unknown


@pytest.mark.parametrize("codec, pixels, ending", [
    ("ffv1", "yuv422p10le", "mkv"), ("libx264", "yuv444p", "mov"), ("libvpx", "yuv420p", "webm"),
    ("gif", "rgb8", "gif"), ("mpeg4", "yuv420p", "avi"),
])  # fmt: skip
def test_other_formats_are_decoded_correctly(codec, pixels, ending, tmp_path):
    frames = scene(3, 0.5)
    path = write_strange(tmp_path / f"a.{ending}", frames, codec=codec, pixels=pixels)
    found = rendered(path)
    assert found.shape == frames.shape
    assert difference(found, frames) < 20  # of 255: a GIF has 256 colours


def test_an_odd_size_is_cropped_to_even(tmp_path):
    frames = scene(4, 0.4, height=61, width=97)
    found = rendered(write_strange(tmp_path / "a.mp4", frames, pixels="yuv444p"))
    assert found.shape[1:3] == (60, 96)
    assert difference(found, frames[:, :60, :96]) < 8


@pytest.mark.parametrize("fit", ["cover", "pad", "stretch"])
def test_another_aspect_is_cropped_padded_or_stretched(fit):
    image = np.full((60, 120, 3), 200, np.uint8)
    image[:, :20] = 0
    found = stage_of(height=40, width=40, fit=fit).fitted(image)
    assert found.shape == (40, 40, 3)
    dark = (found < 50).all(-1)
    edges = {"cover": (0, 0), "pad": (1, 1), "stretch": (0, 1)}  # top row, left column
    assert (dark[0].mean() > 0.5, dark[:, 0].mean() > 0.5) == edges[fit]


def test_short_side_keeps_the_aspect():
    assert stage_of(short_side=64, multiple=16).size(720, 1280) == (64, 112)
    assert stage_of().size(61, 97) == (60, 96)


@pytest.mark.parametrize(
    ("height", "width", "seconds", "dropped"),
    [(64, 96, 1.0, False), (31, 96, 1.0, True), (64, 200, 1.0, True), (64, 96, 0.1, True)],
)
def test_clips_that_are_too_small_too_wide_or_too_short_are_dropped(
    height, width, seconds, dropped
):
    stage = stage_of(min_side=32, max_aspect=3.0, fps=8.0, min_frames=4)
    row = {"info": VideoFile("", width, height, 10, 1.0, 10.0), "start": 0.0, "end": seconds}
    assert ("drop" in stage.decide([row])[0]) == dropped
