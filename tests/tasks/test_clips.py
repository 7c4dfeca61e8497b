"""task=clips: what it writes is what data=cogvideox_folder reads."""

from __future__ import annotations

import torch

from sandbox.cli.jobs import perform
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.evaluation.evaluate import first_clips, training_clips
from tests.helpers import composed


def test_written_clips_come_back_with_their_captions_and_first_frames(tmp_path):
    words = ("task=clips", f"task.to={tmp_path}", "task.count=6", "task.images=true")
    root = wire(composed(*words)).root
    assert perform(root)["clips"] == 6
    made = training_clips(registry.create(root.data).split("train"), 6, root.seed)
    folder = composed("data=cogvideox_folder", f"data.root={tmp_path}", "data.val_fraction=0.5",
                      "data.images=images.txt").data  # fmt: skip
    found = {}
    for split in ("train", "val"):
        batch = first_clips(registry.create(folder).split(split), 6, 0)
        found |= dict(zip(batch.ids, zip(batch.captions, batch.video, batch.image, strict=True),
                          strict=True))  # fmt: skip
    assert [found[name][0] for name in sorted(found)] == made.captions
    videos = torch.stack([found[name][1] for name in sorted(found)])
    assert (videos - made.video).abs().mean() < 0.05  # of 2; h264
    pictures = torch.stack([found[name][2] for name in sorted(found)])
    assert (pictures - made.video[:, :, :1]).abs().max() < 0.01
