"""The first stage of Wan against diffusers, its published size, and its contract."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from plugins.vae.wan import AutoencoderWan
from sandbox.contracts import Clip, SizeError
from sandbox.storage.first_stage_files import matching_weights
from tests.helpers import preset

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32; sums in another order
SMALL = AutoencoderWan.Config(
    base_dim=8, z_dim=4, dim_mult=(1, 2, 2, 1), num_res_blocks=2,
    temperal_downsample=(False, True, True), latents_mean=(0.5, -1.0, 0.0, 2.0),
    latents_std=(1.0, 2.0, 0.5, 3.0),
)  # fmt: skip
TILED = {
    "tile_sample_min_height": 32, "tile_sample_min_width": 32, "tile_sample_stride_height": 24,
    "tile_sample_stride_width": 16,
}  # fmt: skip


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (p == 1))
    return module.eval()


def pair(**changes: Any) -> tuple[AutoencoderWan, AutoencoderKLWan]:
    """Our model and that of diffusers, with equal random weights."""
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample",
             "latents_mean", "latents_std")  # fmt: skip
    settings = {n: list(v) if isinstance(v := getattr(SMALL, n), tuple) else v for n in names}
    theirs = randomised(AutoencoderKLWan(**settings))
    ours = AutoencoderWan(replace(SMALL, **changes))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def video(frames: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_it_equals_diffusers_in_chunks_of_any_size(frames: int, at_once: int | None) -> None:
    ours, theirs = pair(latent_frames_per_pass=at_once)
    x = video(frames)
    got, want = ours.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(got.stored, want.parameters, **CLOSE)
    assert got.mean.shape[2] == (frames - 1) // 4 + 1
    out = theirs.decode(want.mean).sample
    torch.testing.assert_close(ours.pixels(want.mean).clamp(-1, 1), out, **CLOSE)
    torch.testing.assert_close(ours.decode(ours.scaled(want.mean)), out, **CLOSE)


@torch.no_grad()
def test_tiles_equal_those_of_diffusers() -> None:
    ours, theirs = pair(use_tiling=True, **TILED)
    theirs.enable_tiling(**TILED)
    x = video(5, 56, 64)
    want = theirs.encode(x).latent_dist
    torch.testing.assert_close(ours.encode(x).stored, want.parameters, **CLOSE)
    z = want.mean
    torch.testing.assert_close(ours.pixels(z).clamp(-1, 1), theirs.decode(z).sample, **CLOSE)


@torch.no_grad()
def test_latents_are_scaled_by_the_stated_statistics() -> None:
    ours, theirs = pair()
    z = theirs.encode(video(5)).latent_dist.mean
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (SMALL.latents_mean, SMALL.latents_std)
    )
    torch.testing.assert_close(ours.scaled(z), (z - mean) / std, **CLOSE)
    torch.testing.assert_close(ours.unscaled(ours.scaled(z)), z, **CLOSE)
    before = ours.scaled(z)
    ours.calibrate([video(5)])
    assert torch.equal(ours.scaled(z), before)


@torch.no_grad()
def test_statistics_are_measured_where_none_are_stated() -> None:
    model = randomised(AutoencoderWan(replace(SMALL, latents_mean=None, latents_std=None)))
    model.calibrate([video(9)])
    z = model.scaled(model.encode(video(9)).mean).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)


@torch.no_grad()
def test_later_frames_do_not_change_earlier_ones() -> None:
    model, x = randomised(AutoencoderWan(SMALL)), video(9)
    changed = x.clone()
    changed[:, :, 5:] = 0
    before, after = model.encode(x).mean, model.encode(changed).mean
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], **CLOSE)
    assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-3
    z = before.clone()
    z[:, :, 2] = 0
    first, second = model.pixels(before), model.pixels(z)
    torch.testing.assert_close(first[:, :, :5], second[:, :, :5], **CLOSE)


def test_chunks_have_the_gradients_of_the_clip() -> None:
    grads = []
    for at_once in (None, 1):
        model = randomised(AutoencoderWan(replace(SMALL, latent_frames_per_pass=at_once))).double()
        x = video(9).double()
        model.pixels(model.encode(x).mean).square().mean().backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(grad, grads[1][name])


NAMES = (  # patterns of our names, and the official ones
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.(norm1|conv1|norm2|conv2)\.", lambda m: f".residual.{PLACES[m[1]]}."),
    (r"coder\.residual\.2\.", "coder.conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.(\d)", lambda m: f".middle.{2 * int(m[1])}"),
    (r"\.mid_block\.attentions\.0", ".middle.1"),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f".upsamples.{4 * int(m[1]) + 3}"),
)
PLACES = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}


def test_official_weights_are_renamed(tmp_path: Path) -> None:
    """As by diffusers, whose function is the judge of the official names in this test."""
    model = AutoencoderWan(replace(SMALL, dim_mult=(1, 2, 4, 4)))
    own, official = model.state_dict(), {}
    for name, weight in own.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        official[name] = weight
    converted = convert_wan_vae_to_diffusers(dict(official))
    save_file({k: x.contiguous() for k, x in official.items()}, tmp_path / "official.safetensors")
    read = matching_weights(model, tmp_path / "official.safetensors")  # vae.weights=FILE
    for found in (converted, read, model.from_published(official), model.from_published(own)):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)


def test_the_preset_has_the_published_size() -> None:
    cfg = preset("vae", "wan_2_1")
    assert not list(cfg.problems())
    with torch.device("meta"):
        ours, theirs = AutoencoderWan(cfg), AutoencoderKLWan()
    assert sum(p.numel() for p in ours.parameters()) == 126_892_531
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(cfg.latents_mean) == theirs.config["latents_mean"]
    assert list(cfg.latents_std) == theirs.config["latents_std"]
    assert cfg.latents(Clip(3, 81, 480, 832)) == Clip(16, 21, 60, 104)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"temperal_downsample": (True,)}, "want 3 entries"),
        ({"base_dim": 7}, "even numbers"),
        ({"latents_std": (1.0, 1.0)}, "want z_dim=4"),
        ({"latents_std": (1.0, 1.0, 0.0, 1.0)}, "want numbers > 0"),
        ({"use_tiling": True, "tile_sample_stride_width": 100}, "multiple of 8"),
        ({"use_tiling": True, "tile_sample_stride_width": 64}, "128 to 256"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    found = list(replace(SMALL, **changes).problems())
    assert any(problem in p for p in found), found


@pytest.mark.parametrize(("frames", "height"), [(4, 16), (5, 20)])
def test_sizes_without_whole_cells_are_refused(frames: int, height: int) -> None:
    with pytest.raises(SizeError):
        AutoencoderWan(SMALL).encode(video(frames, height))
