"""EasyAnimateV2 as a system: its stages begin from published weights and from one another."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Clip, StorageError
from sandbox.training.build import build_system
from sandbox.weights.init_from import init_from
from tests.helpers import composed, recipe

TINY = ("vae.weights=null", "logger=null")
STAGES = ("stage1", "stage2", "stage3")


def system(stage: str, *overrides: str):
    return build_system(
        wire(composed(f"experiment=easyanimate_v2_{stage}_tiny", *TINY, *overrides))
    )


def pixart(**settings):
    """A picture network of the same width: no motion modules, no skips."""
    from dataclasses import replace

    cfg = recipe("easyanimate_v2_stage1_tiny").backbone
    numbers = {"in_channels": 16, "out_channels": 32, "caption_channels": 32, "vector_dim": 0}
    torch.manual_seed(5)
    plain = {"enable_uvit": False, "motion_module": "none"} | numbers | settings
    return registry.create(replace(cfg, **plain))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_picture_network_begins_the_first_stage(tmp_path, kind):
    image = pixart()
    folder = tmp_path / "transformer"
    folder.mkdir()
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(image.state_dict(), file)
    video = system("stage1")
    init_from(video, folder if kind == "folder" else file)
    state = video.backbone.state_dict()
    assert all(torch.equal(state[k], v) for k, v in image.state_dict().items())


def test_a_smaller_output_repeats_and_new_channels_start_at_zero(tmp_path):
    """As published: a picture network without learned variance, and latents of more channels."""
    image = pixart(in_channels=4, out_channels=16)
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    video = system("stage1")
    init_from(video, tmp_path / "image.safetensors")
    own = video.backbone.state_dict()
    assert torch.equal(own["proj_out.weight"], image.proj_out.weight.repeat(2, 1))
    patches = own["pos_embed.proj.weight"]
    assert torch.equal(patches[:, :4], image.pos_embed.proj.weight) and not patches[:, 4:].any()


def test_what_fits_nowhere_is_refused_by_name(tmp_path):
    """The published loader leaves such weights out and says so in its log."""
    state = pixart(caption_channels=8).state_dict() | {"other": torch.zeros(1)}
    save_file(state, tmp_path / "image.safetensors")
    with pytest.raises(StorageError, match=r"other\n[^$]*caption_projection\.linear_1\.weight"):
        init_from(system("stage1"), tmp_path / "image.safetensors")


def test_released_files_with_tables_of_positions_are_taken(tmp_path):
    from plugins.backbone.easyanimate import to_published

    first = system("stage3", "seed=1")
    save_file(to_published(first.backbone.state_dict(), 16), tmp_path / "released.safetensors")
    second = system("stage3")
    init_from(second, tmp_path / "released.safetensors")
    state, want = second.backbone.state_dict(), first.backbone.state_dict()
    assert all(torch.equal(state[k], want[k]) for k in want)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_the_published_parameters(stage):
    """Of the full-size network, on the meta device."""
    from sandbox.config.param_groups import lr_factors

    root = wire(composed(f"experiment=easyanimate_v2_{stage}")).root
    with torch.device("meta"):
        numbers = {f"backbone.{k}": p.numel()
                   for k, p in registry.create(root.backbone).named_parameters()}  # fmt: skip
    chosen = {k for k, rate in lr_factors(numbers, root.trainable).items() if rate}
    motion = 818_173_440  # reference: the sizes of its parts
    still = 9_593_856 + 6_048_000 + 2_304  # time, text projection, top table
    want = {
        "stage1": 1_446_296_864 - motion - still,
        "stage2": motion,
        "stage3": 1_446_296_864 - still,
    }
    assert sum(numbers[k] for k in chosen) == want[stage]


@pytest.mark.parametrize(
    "data, size",
    [
        (("data=easyanimate_json_384x672",), (48, 48, 84)),
        ((), (48, 64, 64)),
        (("data.height=768", "data.width=768", "data.image_size=768"), (48, 96, 96)),
    ],
)
def test_it_samples_up_to_144_frames_of_768(data, size):
    """The first size of several is the one that is sampled."""
    wiring = wire(composed("experiment=easyanimate_v2_stage3", *data))
    assert wiring.latents[0] == Clip(4, *size)
    root = composed("task=sample", "task.save_fps=24", "experiment=easyanimate_v2_stage3")
    assert (root.task.save_fps, root.sampler.steps, root.guidance.guidance_scale) == (24, 50, 6)


def test_frames_that_windows_would_cut_off_are_refused_with_the_nearest_that_fit():
    from sandbox.contracts import ConfigError

    with pytest.raises(ConfigError, match=r"data\.frames=140: want 1 or a multiple.*135 or 144"):
        wire(composed("experiment=easyanimate_v2_stage3", "data.frames=140"))
