"""DynamiCrafter's recipes: tiny siblings are the published ones shrunk, and fire when those do.

That the published ones equal manifest and numbers is in tests/tasks/test_verify.py.
"""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from sandbox import registry
from sandbox.config import CONF
from sandbox.wiring import wire
from tests.helpers import composed

RECIPES = ("dynamicrafter_512", "dynamicrafter_512_interp", "dynamicrafter_1024")
RULES = ("uncond_prob", "rand_cond_frame", "interp_mode", "fps_condition_type")
SIZES = {  # of the UNet, and what only saves memory
    "in_channels", "model_channels", "attention_resolutions", "num_res_blocks", "channel_mult",
    "num_head_channels", "context_dim", "temporal_length", "use_checkpoint",
}  # fmt: skip

each = pytest.mark.parametrize("recipe", RECIPES)


@each
def test_the_tiny_sibling_differs_in_sizes_alone(recipe):
    full, tiny = composed(f"experiment={recipe}"), composed(f"experiment={recipe}_tiny")
    for group in ("schedule", "loss", "guidance", "optimizer", "lr_schedule", "ema", "layout"):
        assert getattr(tiny, group) == getattr(full, group), group
    for name in RULES:
        assert getattr(tiny.conditioning, name) == getattr(full.conditioning, name), name
    assert (tiny.trainer.accumulate, tiny.trainer.clip) == (full.trainer.accumulate, 0.5)
    ours, theirs = asdict(tiny.backbone), asdict(full.backbone)
    assert {k for k in ours if ours[k] != theirs[k]} <= SIZES


@each
def test_the_tiny_sibling_wires(recipe):
    wiring = wire(composed(f"experiment={recipe}_tiny"))
    assert wiring.slots[0].image_context.frames == wiring.clips[0].frames
    assert wiring.slots[0].scalars == {"fps"}


@each
def test_the_published_checkpoints_and_samples_come_at_their_moments(recipe):
    root = composed(f"experiment={recipe}")
    keep, images = registry.create(root.checkpoint), root.callbacks["images"]
    assert [n for n in range(1, 30001) if keep.due(n)] == [9000, 18000, 27000]
    assert root.checkpoint.weights_every == 10000
    assert [n for n in range(1, 2001) if images.due(n)] == [500, 1000, 1500, 2000]


@pytest.mark.parametrize(
    "name, fps", [("512", 24), ("512_interp", 5), ("1024", 10)]
)  # scripts/run.sh and run_application.sh
def test_the_sampling_recipes_tell_the_published_rate(name, fps):
    """Those in the comment on top of the recipe."""
    text = (CONF / f"experiment/dynamicrafter_{name}.yaml").read_text(encoding="utf-8")
    words = re.search(r"task=sample task\.fps=\d+ task\.save_fps=\d+", text)[0].split()
    root = composed(*words, f"experiment=dynamicrafter_{name}")
    assert (root.task.fps, root.task.save_fps) == (fps, 8)
    assert (root.sampler.steps, root.sampler.eta, root.sampler.spacing) == (50, 1.0, "trailing")
    assert (root.guidance.guidance_scale, root.guidance.guidance_rescale) == (7.5, 0.7)
