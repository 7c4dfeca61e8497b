"""stage=[aesthetic]: CLIP and head with seeded weights, compared with their own libraries."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sandbox.config import discovery, registry
from sandbox.data.video_files import VideoClip, probe
from tests.raw_videos import scene, write

discovery.setup()

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.slow
def test_the_score_equals_the_published_predictor(tmp_path):
    import open_clip
    from PIL import Image

    (tmp_path / "tiny.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    head = nn.Module()
    head.layers = nn.Sequential(  # as in the predictor; dropout is inactive in eval mode
        nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1)
    )
    torch.save(head.state_dict(), tmp_path / "head.pth")
    files = {"weights": str(tmp_path / "clip.pt"), "head": str(tmp_path / "head.pth")}
    cfg = replace(registry.default("stage", "aesthetic"), model="tiny", **files)
    path = write(tmp_path / "a.mp4", scene(1, 1))
    clip = VideoClip(path, probe(path))
    found = registry.create(cfg).score(clip)["score"]

    with torch.no_grad():
        pixels = [preprocess(Image.fromarray(x)) for x in clip.at(cfg.times(clip.seconds))]
        features = model.eval().encode_image(torch.stack(pixels))
        want = head.eval().layers(features / features.norm(dim=-1, keepdim=True)).mean().item()
    assert found == pytest.approx(want, abs=1e-4)  # rounded to four decimals
    assert np.isfinite(found)


def test_clips_below_the_limit_are_dropped():
    stage = registry.create(registry.default("stage", "aesthetic"))
    rows = [{"scores": {"aesthetic": {"score": s}}} for s in (3.9, 4.0, 6.0)]
    assert ["drop" in verdict for verdict in stage.decide(rows)] == [True, False, False]
