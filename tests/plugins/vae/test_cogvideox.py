"""The CogVideoX VAE against recorded outputs, its published size, and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from plugins._blocks import cogvideox_autoencoder
from plugins.vae.cogvideox import AutoencoderCogVideoX
from sandbox.contracts import Clip, Misfit
from tests.helpers import preset

GOLDEN = Path(__file__).parents[2] / "golden/cogvideox"
NEAR = {"atol": 3e-5, "rtol": 2e-4}  # as recorded with the fixtures
KNOWN = set(AutoencoderCogVideoX.Config.__dataclass_fields__)


def recorded(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"vae_{name}.safetensors")


def golden(**changes: object) -> AutoencoderCogVideoX:
    """The tiny published model with recorded weights."""
    path = GOLDEN / "vae_weights.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["meta"])["config"]
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in KNOWN}
    model = AutoencoderCogVideoX(replace(AutoencoderCogVideoX.Config(**sizes), **changes))
    model.load_state_dict({k[11:]: v for k, v in load_file(path).items()})
    return model.eval()


TILES = {
    "tile_sample_min_height": 32, "tile_sample_min_width": 32,
    "tile_overlap_factor_height": 0.25, "tile_overlap_factor_width": 0.25,
}  # fmt: skip


def small(**changes: object) -> AutoencoderCogVideoX:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AutoencoderCogVideoX(replace(AutoencoderCogVideoX.Config(), **changes)).eval()


# the published model


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
@torch.no_grad()
def test_moments_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("io")
    got = golden().encode(fixture["video"][:, :, :frames]).stored
    torch.testing.assert_close(got, fixture[f"moments_T{frames}"], **NEAR)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@torch.no_grad()
def test_pixels_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("io")
    got = golden().pixels(fixture["z"][:, :, :frames])
    torch.testing.assert_close(got, fixture[f"decoded_T{frames}"], **NEAR)


@torch.no_grad()
def test_chunks_change_the_function() -> None:
    fixture = recorded("io")
    contrast = fixture["moments_T17_unbatched_contrast"]
    unchunked = golden(num_sample_frames_batch_size=100).encode(fixture["video"]).stored
    torch.testing.assert_close(unchunked, contrast, **NEAR)
    assert (golden().encode(fixture["video"]).stored - contrast).abs().max() > 0.1


@torch.no_grad()
def test_tiles_equal_the_recorded_ones() -> None:
    model, fixture = golden(use_tiling=True, **TILES), recorded("tiled")
    moments = model.encode(fixture["video"]).stored
    torch.testing.assert_close(moments, fixture["tiled_moments"], **NEAR)
    torch.testing.assert_close(model.pixels(fixture["z"]), fixture["tiled_decoded"], **NEAR)


@torch.no_grad()
def test_without_tiling_large_frames_equal_the_recorded_ones() -> None:
    model, fixture = golden(**TILES), recorded("tiled")
    moments = model.encode(fixture["video"]).stored
    torch.testing.assert_close(moments, fixture["plain_moments"], **NEAR)
    torch.testing.assert_close(model.pixels(fixture["z"]), fixture["plain_decoded"], **NEAR)


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b"])
def test_presets_have_the_published_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = AutoencoderCogVideoX(preset("vae", name))
    manifest = json.loads((GOLDEN / "cogvideox_vae.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: shape for k, (shape, _) in manifest.items()
    }
    assert sum(p.numel() for p in model.parameters()) == 215_583_907


def test_presets_have_the_published_tiles() -> None:
    with torch.device("meta"):
        model = AutoencoderCogVideoX(preset("vae", "cogvideox_5b"))
    rows, columns = (model.tiles(name, to_latents=False) for name in ("height", "width"))
    assert (rows.size, columns.size) == (30, 45)
    assert (rows.blend, columns.blend) == (40, 72)
    assert not list(replace(model.cfg, use_tiling=True).problems())


def test_latents_are_multiplied_as_published() -> None:
    z = torch.ones(1, 4, 1, 2, 2)
    model = golden(scaling_factor=1.15258426)
    torch.testing.assert_close(model.scaled(z), 1.15258426 * z)
    torch.testing.assert_close(model.unscaled(model.scaled(z)), z)


# the contract


@pytest.mark.parametrize(
    ("clip", "latents"),
    [
        (Clip(3, 49, 480, 720), Clip(16, 13, 60, 90)),
        (Clip(3, 81, 768, 1360), Clip(16, 21, 96, 170)),
        (Clip(3, 1, 480, 720), Clip(16, 1, 60, 90)),
    ],
)
def test_published_clips_have_the_published_latents(clip: Clip, latents: Clip) -> None:
    assert preset("vae", "cogvideox_5b").latents(clip) == latents


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (Clip(3, 53, 480, 720), "frames=53: want 1 plus a multiple of 8"),
        (Clip(3, 48, 480, 720), "frames=48: want 1 plus a multiple of 8"),
        (Clip(3, 0, 480, 720), "frames=0: want 1 plus a multiple of 8"),
        (Clip(3, 49, 484, 720), "height=484: want a multiple of 8"),
        (Clip(1, 49, 480, 720), "channels=1: want 3"),
    ],
)
def test_a_clip_that_would_lose_frames_is_refused(clip: Clip, message: str) -> None:
    with pytest.raises(Misfit) as error:
        preset("vae", "cogvideox_5b").latents(clip)
    assert str(error.value) == message


@torch.no_grad()
def test_no_chunk_depends_on_a_later_one() -> None:
    model, x = small(), torch.randn(1, 3, 17, 16, 16)
    other = x.clone()
    other[:, :, 9:] = 0
    a, b = model.encode(x).stored, model.encode(other).stored
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    assert not torch.equal(a[:, :, 3:], b[:, :, 3:])


@torch.no_grad()
def test_a_chunk_depends_on_the_last_frame_of_the_one_before() -> None:
    model, x = small(), torch.randn(1, 3, 17, 16, 16)
    other = x.clone()
    other[:, :, 8] = 0
    assert not torch.equal(model.encode(x).stored[:, :, 3:], model.encode(other).stored[:, :, 3:])


@torch.no_grad()
def test_slicing_does_not_change_the_result() -> None:
    x = torch.randn(3, 3, 9, 16, 16)
    torch.testing.assert_close(small(use_slicing=True).encode(x).stored, small().encode(x).stored)


@torch.no_grad()
def test_splitting_large_inputs_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 9, 16, 16)
    unsplit = small().encode(x).stored
    monkeypatch.setattr(cogvideox_autoencoder, "LARGE", 10_000)
    torch.testing.assert_close(small().encode(x).stored, unsplit)


@torch.no_grad()
def test_no_state_is_kept_between_calls() -> None:
    model, x = small(), torch.randn(1, 3, 9, 16, 16)
    first = model.encode(x).stored
    model.encode(torch.randn_like(x))
    assert torch.equal(model.encode(x).stored, first)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block_out_channels": ()}, "block_out_channels=(): want at least one level"),
        ({"norm_num_groups": 5}, "norm_num_groups=5: want a divisor of all widths [16, 32, 32]"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio=3: want a power of 2"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio=8: want a power of 2"),
        ({"num_latent_frames_batch_size": 3}, "num_latent_frames_batch_size=3: want an even"),
        ({"num_sample_frames_batch_size": 4}, "num_sample_frames_batch_size=4: want 8"),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan: want > 0"),
        ({"tile_overlap_factor_width": 0.6}, "tile_overlap_factor_width=0.6: want 0 to 0.5"),
        (
            {"use_tiling": True, "tile_sample_min_width": 18},
            "tile_overlap_factor_width=0.2: tiles of 18 pixels (4 latents) must overlap by",
        ),
    ],
)
def test_a_bad_setting_is_reported(changes: dict, problem: str) -> None:
    problems = list(replace(AutoencoderCogVideoX.Config(), **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems
