"""stage=[motion]: measures known motion, and drops too little or too much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sandbox.config import discovery, registry
from sandbox.contracts import StorageError
from sandbox.data.video_files import VideoClip, probe
from tests.helpers import composed
from tests.raw_videos import precision_recall, scene, write

discovery.setup()
SPEEDS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.2, 1.4, 2.0, 2.4)  # pixels per frame


def flow_of(path, **settings) -> float:
    stage = registry.create(replace(registry.default("stage", "motion"), **settings))
    return stage.score(VideoClip(path, probe(path)))["flow"]


@pytest.mark.parametrize("method", ["farneback", "dis"])
def test_clips_with_too_little_or_too_much_motion_are_dropped(method, tmp_path):
    want, found = set(), set()
    stage = registry.create(replace(registry.default("stage", "motion"), method=method))
    for seed in range(2):
        for i, speed in enumerate(SPEEDS):
            direction = ((speed, 0.0), (0.0, -speed))[(seed + i) % 2]
            path = tmp_path / f"{seed}-{i}.mp4"
            write(path, scene(10 * seed + i, 1.5, direction, 128, 160))
            row = {"scores": {"motion": stage.score(VideoClip(path, probe(path)))}}
            if not 3 <= 5 * speed <= 8:  # sampled frames are 5 apart
                want.add(path.name)
            if "drop" in stage.decide([row])[0]:
                found.add(path.name)
    precision, recall = precision_recall(want, found)
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, want ^ found)


def test_flow_is_in_pixels_between_sampled_frames(tmp_path):
    path = write(tmp_path / "a.mp4", scene(3, 2, (1.0, 0.0), 128, 160))
    # within 15 %: pixels that enter at an edge have no match
    assert flow_of(path) == pytest.approx(5, rel=0.15)
    assert flow_of(path, fps=5.0) == pytest.approx(2, rel=0.15)
    assert flow_of(path, short_side=64) == pytest.approx(2.5, rel=0.15)


@pytest.mark.slow
def test_raft_loads_a_weights_file_strictly(tmp_path):
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    torch.save(raft_large().state_dict(), tmp_path / "raft.pth")
    path = write(tmp_path / "a.mp4", scene(3, 0.6))
    one = flow_of(path, method="raft", weights=str(tmp_path / "raft.pth"))
    assert one > 0
    assert one == flow_of(path, method="raft", weights=str(tmp_path / "raft.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "raft.pth")
    with pytest.raises((RuntimeError, StorageError), match=r"Missing key|differ"):
        flow_of(path, method="raft", weights=str(tmp_path / "raft.pth"))


def test_raft_without_weights_is_a_config_problem():
    root = composed("task=prepare", "data_root=.", "stage=[motion]", "stage.motion.method=raft")
    assert [*root.stage["motion"].problems()] == [
        "weights=null: want a file of torchvision's raft_large for method=raft"
    ]
