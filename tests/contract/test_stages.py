"""Interfaces of every stage of task=prepare."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import numpy as np
import pytest

from sandbox.config import registry
from sandbox.contracts import CuttingStage, DecidingStage, RenderingStage, ScoringStage
from sandbox.data.video_files import VideoClip, probe
from tests.helpers import plugin_configs
from tests.raw_videos import scene, write

CONFIGS = dict(plugin_configs("stage"))
STAGES = {key: registry.create(cfg) for key, cfg in CONFIGS.items()}
WEIGHTLESS = [k for k, c in CONFIGS.items() if None not in c.files().values()]


def of_kind(kind: type, keys: list[str] | None = None) -> pytest.MarkDecorator:
    chosen = STAGES if keys is None else keys
    return pytest.mark.parametrize("key", [k for k in chosen if isinstance(STAGES[k], kind)])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("raw") / "a.mp4", scene(1, 1.5))


def clip(file, start=0.0, end=None) -> VideoClip:
    return VideoClip(file, probe(file), start, end)


@of_kind(object)
def test_it_implements_a_stage_interface(key):
    assert isinstance(STAGES[key], (ScoringStage, CuttingStage, DecidingStage, RenderingStage))


@of_kind(object)
def test_its_limits_are_settings(key):
    assert set(CONFIGS[key].limits) <= {f.name for f in fields(CONFIGS[key])}


@of_kind(object)
@pytest.mark.parametrize("seconds", [0.04, 1.0, 3.3])
def test_it_requests_frames_of_the_clip_in_order(key, seconds):
    times = CONFIGS[key].times(seconds)
    assert times == sorted(times)
    assert all(0 <= t < seconds for t in times)


@of_kind(ScoringStage, WEIGHTLESS)
def test_scores_are_plain_and_deterministic(key, file):
    first = STAGES[key].score(clip(file, 0.2, 1.3))
    assert first
    assert json.loads(json.dumps(first)) == first
    assert registry.create(CONFIGS[key]).score(clip(file, 0.2, 1.3)) == first


@of_kind(CuttingStage, WEIGHTLESS)
def test_spans_are_ordered_inside_the_clip_and_do_not_overlap(key, file):
    spans = STAGES[key].spans(STAGES[key].score(clip(file)), 1.5)
    edges = [t for start, end, _ in spans for t in (start, end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0 and edges[-1] <= 1.5
    assert all(isinstance(why, str) for _, _, why in spans)


@of_kind(DecidingStage)
def test_decide_returns_a_decision_per_clip_and_modifies_none(key, file):
    name, (info, stage) = key.partition("/")[2], (probe(file), STAGES[key])
    rows = [
        {"id": str(i), "source": f"a{i}.mp4", "path": file.with_name(f"a{i}.mp4"), "info": info,
         "start": 0.0, "end": 1.5, "scores": {}} for i in range(3)
    ]  # fmt: skip
    for row in rows if isinstance(stage, ScoringStage) else ():
        known = stage.score(clip(file)) if key in WEIGHTLESS else {"score": 1.0}
        row["scores"][name] = known
    before = copy.deepcopy(rows)
    decisions = stage.decide(rows)
    assert rows == before
    assert len(decisions) == len(rows)
    assert json.loads(json.dumps(decisions)) == decisions
    assert stage.decide(rows) == decisions
    assert stage.decide([]) == []


@of_kind(RenderingStage)
def test_a_rendering_has_frames_of_one_even_size_and_an_fps(key, file):
    made = STAGES[key].render(clip(file, 0.5, 1.5))
    frames = list(made.frames)
    assert made.fps > 0
    assert {f.dtype for f in frames} == {np.dtype(np.uint8)}
    ((height, width, channels),) = {f.shape for f in frames}
    assert height % 2 == width % 2 == 0 and channels == 3
    assert len(frames) == round(1.0 * made.fps)
