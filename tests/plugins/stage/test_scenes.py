"""stage=[scenes]: finds known cuts, and only those."""

from __future__ import annotations

import numpy as np
import pytest

from sandbox.config import discovery, registry
from sandbox.data.video_files import VideoClip, probe
from tests.raw_videos import precision_recall, scene, write

discovery.setup()


def cuts_of(path):
    stage = registry.create(registry.default("stage", "scenes"))
    return stage.score(VideoClip(path, probe(path)))["cuts"]


def test_only_known_cuts_are_found(tmp_path):
    draw, want, found = np.random.default_rng(0), set(), set()
    for file in range(8):
        lengths = draw.integers(15, 40, draw.integers(1, 7)) / 10
        speeds = draw.integers(-1, 2, (len(lengths), 2))
        parts = [
            scene(100 * file + i, s, tuple(v), 96, 128, detail=0.1)
            for i, (s, v) in enumerate(zip(lengths, speeds, strict=True))
        ]
        path = write(tmp_path / f"{file}.mp4", np.concatenate(parts), crf=20)
        want |= {(file, round(float(t), 1)) for t in np.cumsum(lengths)[:-1]}
        found |= {(file, round(t, 1)) for t in cuts_of(path)}
    assert len(want) > 20
    precision, recall = precision_recall(want, found)
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, want ^ found)


@pytest.mark.parametrize(
    ("cuts", "seconds", "want"),
    [
        ([], 2.0, [(0, 2, True)]),
        ([], 12.0, [(0, 10, False), (10, 12, True)]),
        ([], 13.5, [(0, 10, False), (10, 13.5, False)]),
        ([4.0, 4.5], 30.0, [(0, 4, False), (4, 4.5, True), (4.5, 14.5, False), (14.5, 24.5, False),
                            (24.5, 30, False)]),
    ],
)  # fmt: skip
def test_long_scenes_are_cut_into_pieces_and_short_ones_dropped(cuts, seconds, want):
    stage = registry.create(registry.default("stage", "scenes"))
    spans = stage.spans({"cuts": cuts}, seconds)
    assert [(start, end, bool(why)) for start, end, why in spans] == want
