"""DynamiCrafter's recipes: tiny siblings differ in size only; checkpoints and samples as published.

tests/tasks/test_verify.py compares the published recipes with the manifest and numbers.
"""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from sandbox.config import registry
from sandbox.config.paths import CONF
from sandbox.config.wiring import wire
from tests.helpers import composed

RECIPES = ("dynamicrafter_512", "dynamicrafter_512_interp", "dynamicrafter_1024")
RULES = ("uncond_prob", "rand_cond_frame", "interp_mode", "fps_condition_type")
SIZES = {  # UNet sizes and memory settings
    "in_channels", "model_channels", "attention_resolutions", "num_res_blocks", "channel_mult",
    "num_head_channels", "context_dim", "temporal_length", "use_checkpoint",
}  # fmt: skip

each = pytest.mark.parametrize("recipe", RECIPES)


@each
def test_the_tiny_sibling_differs_only_in_sizes(recipe):
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
def test_checkpoints_and_samples_are_due_at_the_published_steps(recipe):
    root = composed(f"experiment={recipe}")
    keep, images = registry.create(root.checkpoint), root.callbacks["images"]
    assert [n for n in range(1, 30001) if keep.due(n)] == [9000, 18000, 27000]
    assert root.checkpoint.weights_every == 10000
    assert [n for n in range(1, 2001) if images.due(n)] == [500, 1000, 1500, 2000]


@pytest.mark.parametrize(
    "name, fps", [("512", 24), ("512_interp", 5), ("1024", 10)]
)  # scripts/run.sh and run_application.sh
def test_the_sampling_commands_use_the_published_fps(name, fps):
    """The commands are in the header comment of the recipe."""
    text = (CONF / f"experiment/dynamicrafter_{name}.yaml").read_text(encoding="utf-8")
    words = re.search(r"task=sample task\.fps=\d+ task\.save_fps=\d+", text)[0].split()
    root = composed(*words, f"experiment=dynamicrafter_{name}")
    assert (root.task.fps, root.task.save_fps) == (fps, 8)
    assert (root.sampler.steps, root.sampler.eta, root.sampler.spacing) == (50, 1.0, "trailing")
    assert (root.guidance.guidance_scale, root.guidance.guidance_rescale) == (7.5, 0.7)
