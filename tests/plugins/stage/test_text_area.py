"""stage=[text_area]: measures text of a known size."""

from __future__ import annotations

import numpy as np
import pytest

from sandbox.config import discovery, registry
from tests.raw_videos import precision_recall, scene, written

discovery.setup()

WORDS = ("BREAKING NEWS", "subscribe now", "Chapter 12", "THE END", "www.example.org", "LIVE 20:45")


@pytest.fixture(scope="module")
def stage():
    return registry.create(registry.default("stage", "text_area"))


def box_of(text: str, scale: float) -> int:
    """Area in pixels of the box around text drawn by cv2."""
    import cv2

    (w, h), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, scale, 2)
    return w * (h + below)


def test_the_area_is_about_that_of_the_text(stage):
    image = written(scene(1, 0.1, height=240, width=320), "BREAKING NEWS")[0]
    # rapidocr's box differs a little from cv2's
    assert stage.area(image) == pytest.approx(box_of("BREAKING NEWS", 1.0) / (240 * 320), rel=0.4)
    assert stage.area(np.full_like(image, 90)) == 0


@pytest.mark.slow
def test_only_clips_with_much_text_are_dropped(stage):
    want, found = set(), set()
    for i in range(40):
        frames = scene(i, 0.1, height=240, width=320)
        text, has_text = WORDS[i % len(WORDS)], i % 2 == 0
        if has_text:  # at least 4 % of the frame
            frames = written(frames, text, 0.9 + 0.02 * i / 2)
        elif i % 4 == 1:  # a small mark, well below 2 %
            frames = written(frames, "tv", 0.4)
        row = {"scores": {"text_area": {"area": stage.area(frames[0])}}}
        if has_text:
            want.add(i)
        if "drop" in stage.decide([row])[0]:
            found.add(i)
    precision, recall = precision_recall(want, found)
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, want ^ found)
