"""The MagViT VAE against recorded outputs of EasyAnimateV2, its size, and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from plugins._blocks.autoencoder3d import CausalConv3d, Upsampler
from plugins._blocks.haar import keep_smoothest
from plugins._blocks.tiling import apply_tiled
from plugins.vae.magvit import MagViT
from sandbox.contracts import Clip, SizeError
from sandbox.data.randomness import Keyed, Recorded

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden/easyanimate"
SMALL = MagViT.Config(ch=8, latent_channels=4)
ONE_WINDOW = {1: {}, 9: {}, 17: {"mini_batch_encoder": 17, "mini_batch_decoder": 5}}


def published() -> MagViT.Config:
    preset = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/vae/magvit_easyanimate_v2.yaml"))
    del preset["defaults"]
    return MagViT.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()})


def recorded(name: str) -> dict[str, Tensor]:
    """Tensors of a fixture; stored as float16 where that is exact."""
    return {k: v.float() for k, v in load_file(GOLDEN / f"{name}.safetensors").items()}


def golden(**changes: object) -> MagViT:
    """The tiny published model with recorded weights."""
    facts = json.loads((GOLDEN / "vae_magvit.json").read_text())["config"]
    known = {k: v for k, v in facts.items() if k in MagViT.Config.__dataclass_fields__}
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    cfg = MagViT.Config(**sizes, scale_factor=1.0, shift=0.0, start="published")
    model = MagViT(replace(cfg, **changes))
    weights = {k[2:]: v for k, v in recorded("vae_magvit").items() if k.startswith("w.")}
    model.load_state_dict(weights)
    return model.eval()


def near(name: str, got: Tensor, want: Tensor) -> None:
    """Tolerance of the fixtures; another torch version stays below 1.7e-6."""
    error = ((got - want).norm() / want.norm()).item()
    largest = (got - want).abs().max().item()
    limit = 1e-5 * max(1.0, want.abs().max().item())
    assert error <= 5e-6, f"{name}: relative error {error:.1e}, largest {largest:.1e}"
    assert largest <= limit, f"{name}: relative error {error:.1e}, largest {largest:.1e}"


def clips(batch: int = 2, frames: int = 9, size: int = 16) -> Tensor:
    """Smooth coloured clips in [-1, 1]."""
    noise = torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool3d(noise, (1, 5, 5), 1, (0, 2, 2)).mul(3).tanh()


def built(cfg: MagViT.Config = SMALL) -> MagViT:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return MagViT(cfg)


# the published model


@pytest.mark.parametrize("frames", ONE_WINDOW)
@torch.no_grad()
def test_moments_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("vae_magvit")
    got = golden(**ONE_WINDOW[frames]).encode(fixture[f"in.x_T{frames}"]).stored
    near("moments", got, fixture[f"out.moments_T{frames}"])


@pytest.mark.parametrize("frames", ONE_WINDOW)
@torch.no_grad()
def test_pixels_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("vae_magvit")
    mean = fixture[f"out.moments_T{frames}"][:, :4]
    pixels = golden(**ONE_WINDOW[frames]).pixels(mean)
    near("pixels", pixels, fixture[f"out.decode_of_mean_T{frames}"])


@torch.no_grad()
def test_windows_equal_the_recorded_ones() -> None:
    model, fixture = golden(), recorded("vae_magvit_ops")
    mean = model.encode(fixture["in.x_chunked"]).mean
    near("latents", mean, fixture["out.latent_mean_chunked"])
    near("video", model.decode(mean), fixture["out.decode_chunked"])


@torch.no_grad()
def test_smoothed_windows_equal_the_recorded_ones() -> None:
    # Starts from the recorded video: encoding twice would magnify the rounding.
    fixture = recorded("vae_magvit_ops")
    near("video", golden().smoothed(fixture["out.decode_chunked"]), fixture["out.smoothed_chunked"])


@torch.no_grad()
def test_decode_smooths_with_smooth_output() -> None:
    z = recorded("vae_magvit_ops")["out.latent_mean_chunked"]
    model = golden()
    want = model.smoothed(model.decode(z))
    assert torch.equal(golden(smooth_output=True).decode(z), want)


@torch.no_grad()
def test_tiles_equal_the_recorded_ones() -> None:
    model = golden(use_tiling=True, tile_sample_min_size=32)
    fixture = recorded("vae_magvit_ops")
    moments = model.encode(fixture["in.x_tiled"]).stored
    near("moments", moments, fixture["out.moments_tiled"])
    pixels = model.pixels(fixture["out.moments_tiled"][:, :4])
    near("pixels", pixels, fixture["out.decode_tiled"])


def test_preset_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = MagViT(published())
    manifest = json.loads((GOLDEN / "easyanimate_v2_vae_magvit.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {
        k: shape for k, (shape, _) in manifest.items()
    }


def test_preset_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = MagViT(published())
    assert sum(p.numel() for p in model.parameters()) == 245_979_879


def test_preset_has_no_problems() -> None:
    assert not list(published().problems())


# the contract


@pytest.mark.parametrize(
    ("cfg", "clip", "latents"),
    [
        (published(), Clip(3, 144, 512, 512), Clip(4, 48, 64, 64)),
        (published(), Clip(3, 1, 384, 672), Clip(4, 1, 48, 84)),
        (MagViT.Config(), Clip(3, 9, 16, 16), Clip(16, 3, 4, 4)),
        (replace(SMALL, **ONE_WINDOW[17]), Clip(3, 34, 16, 8), Clip(4, 10, 4, 2)),
    ],
)
def test_latents_follow_the_windows(cfg: MagViT.Config, clip: Clip, latents: Clip) -> None:
    assert cfg.latents(clip) == latents


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (Clip(3, 8, 16, 16), "frames=8: want 1 or a multiple of 9, the frames of a window"),
        (Clip(3, 10, 16, 16), "frames=10: want 1 or a multiple of 9, the frames of a window"),
        (Clip(3, 0, 16, 16), "frames=0: want 1 or a multiple of 9, the frames of a window"),
        (Clip(3, 9, 18, 16), "height=18: want a multiple of 4"),
        (Clip(3, 9, 16, 6), "width=6: want a multiple of 4"),
        (Clip(1, 9, 16, 16), "channels=1: want 3"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(clip: Clip, message: str) -> None:
    with pytest.raises(SizeError) as error:
        MagViT.Config().latents(clip)
    assert str(error.value) == message


@pytest.mark.parametrize("frames", [1, 9, 18])
@torch.no_grad()
def test_shapes_match_the_config(frames: int) -> None:
    model, x = built(), clips(frames=frames)
    z = model.scaled(model.encode(x).mean)
    assert Clip(*z.shape[1:]) == model.cfg.latents(Clip(*x.shape[1:]))
    assert model.decode(z).shape == x.shape


def test_encode_refuses_frames_that_fill_no_window() -> None:
    with pytest.raises(SizeError, match="frames=10"):
        built().encode(clips(frames=10))


def test_decode_refuses_latents_that_fill_no_window() -> None:
    with pytest.raises(ValueError, match="latents have 4 frames: want 1 or a multiple of 3"):
        built().decode(torch.zeros(1, 4, 4, 4, 4))


@torch.no_grad()
def test_windows_are_independent() -> None:
    model, x = built(), clips(frames=18)
    both = model.encode(x).stored
    torch.testing.assert_close(both[:, :, 3:], model.encode(x[:, :, 9:]).stored)


@torch.no_grad()
def test_decode_stays_within_the_range_of_pixels() -> None:
    video = built().decode(50 * torch.randn(1, 4, 3, 4, 4))
    assert video.abs().max() <= 1


@torch.no_grad()
def test_smoothing_does_not_change_a_single_window() -> None:
    z = torch.randn(1, 4, 3, 4, 4)
    plain, smooth = built(), built(replace(SMALL, smooth_output=True))
    assert torch.equal(plain.decode(z), smooth.decode(z))


@torch.no_grad()
def test_smoothing_samples_with_the_given_draws() -> None:
    model, z = built(replace(SMALL, smooth_output=True)), torch.randn(1, 4, 6, 4, 4)
    model.quant_conv.bias[4:] = 0.0  # a posterior wide enough to see
    zero = Recorded({"smooth": torch.zeros(1, 4, 3, 4, 4)})
    noisy = Recorded({"smooth": torch.ones(1, 4, 3, 4, 4)})
    assert torch.equal(model.decode(z, zero), model.decode(z))
    assert not torch.equal(model.decode(z, noisy), model.decode(z))


@torch.no_grad()
def test_decode_keeps_no_state_between_calls() -> None:
    model = built(replace(SMALL, smooth_output=True))
    z = torch.randn(1, 4, 6, 4, 4)
    first = model.decode(z)
    model.decode(torch.randn(1, 4, 1, 4, 4))
    assert torch.equal(model.decode(z), first)


def test_every_parameter_gets_a_gradient_from_reconstruction() -> None:
    model = built(replace(SMALL, start="published"))
    draws = Keyed(0, 0, torch.arange(2), 2)
    out = model.reconstruct(clips(), draws)
    (out.video.square().sum() + out.posterior.kl().sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax is invariant to the bias of keys.
    assert [n for n in without if not n.endswith("to_k.bias")] == []


@torch.no_grad()
def test_bfloat16_runs() -> None:
    model = built().to(torch.bfloat16)
    x = clips().to(torch.bfloat16)
    video = model.decode(model.scaled(model.encode(x).mean))
    assert video.dtype == torch.bfloat16
    assert video.isfinite().all()


@torch.no_grad()
def test_spatial_attention_covers_one_frame() -> None:
    model = built(replace(SMALL, mid_block_attention_type="spatial", start="published"))
    attention = model.encoder.mid_block.attentions[0]
    x = torch.randn(1, 16, 3, 4, 4)
    single = attention(x[:, :, 1:2])
    torch.testing.assert_close(attention(x)[:, :, 1:2], single)


def test_attention_is_optional() -> None:
    model = built(replace(SMALL, mid_block_use_attention=False))
    assert not [n for n in model.state_dict() if "attentions" in n]
    assert model.encode(clips()).mean.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ch": 0}, "ch=0: want >= 1"),
        ({"ch_mult": ()}, "ch_mult=(): want at least one level"),
        ({"ch_mult": (1, 2)}, "down_block_types has 3 entries: want 2"),
        ({"norm_num_groups": 5}, "norm_num_groups=5: want a divisor of all widths [16, 32, 32]"),
        ({"mid_block_num_attention_heads": 5}, "mid_block_num_attention_heads=5: want a divisor"),
        ({"mid_block_attention_type": "2d"}, "mid_block_attention_type='2d': want one of"),
        ({"start": "pca"}, "start='pca': want one of ['published', 'haar']"),
        ({"latent_channels": 2}, "start='haar' with [16, 32, 32] channels and 2 latent channels"),
        ({"down_block_types": ("Down",) * 3}, "down_block_types='Down': want one of"),
        ({"up_block_types": ("SpatialUpBlock3D",) * 3}, "up_block_types multiply (time, space)"),
        ({"mini_batch_encoder": 8}, "mini_batch_encoder=8: want 1 plus a multiple of 4"),
        ({"mini_batch_decoder": 2}, "mini_batch_decoder=2: want 3, the latent frames of"),
        ({"tile_sample_min_size": 30}, "tile_sample_min_size=30: want a multiple of 4"),
        ({"tile_overlap_factor": 0.3}, "tile_overlap_factor=0.3: tiles of 64 latents"),
        ({"tile_overlap_factor": float("nan")}, "tile_overlap_factor=nan: want 0 to 0.5"),
        ({"scale_factor": 0.0}, "scale_factor=0.0: want > 0"),
    ],
)
def test_a_bad_setting_is_reported(changes: dict, problem: str) -> None:
    problems = list(replace(MagViT.Config(), **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems


def test_defaults_have_no_problems() -> None:
    assert not list(MagViT.Config().problems())


# initial weights


@torch.no_grad()
def test_haar_downsampler_takes_averages_first_and_then_differences() -> None:
    conv, x = CausalConv3d(3, 16, (2, 2)), torch.randn(1, 3, 5, 8, 8)
    orders = keep_smoothest(conv, [0, 0.01, 0.01], 16)
    average = torch.nn.functional.avg_pool3d(x[:, :, 1:], 2)
    torch.testing.assert_close(conv(x)[:, :3, 1:], average)
    rows = x[:, :1, 1:, 0::2] - x[:, :1, 1:, 1::2]
    difference = torch.nn.functional.avg_pool3d(rows, (2, 1, 2)) / 2
    assert any(
        torch.allclose(c, difference[:, 0], atol=1e-6) for c in conv(x)[:, 3:6, 1:].unbind(1)
    )
    assert orders == sorted(orders)


@torch.no_grad()
def test_haar_start_makes_residual_blocks_the_identity() -> None:
    block = built(MagViT.Config()).decoder.up_blocks[0].convs[0]
    x = torch.randn(1, 32, 2, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("mult", [(1, 1), (1, 2, 4, 4), (2, 1, 1)])
def test_haar_start_supports_other_levels(mult: tuple[int, ...]) -> None:
    down = ("SpatialDownBlock3D",) * len(mult)
    up = ("SpatialUpBlock3D",) * len(mult)
    cfg = replace(SMALL, ch_mult=mult, down_block_types=down, up_block_types=up)
    cfg = replace(cfg, mini_batch_decoder=9)
    assert not list(cfg.problems())
    assert built(cfg).encode(clips()).mean.isfinite().all()


@torch.no_grad()
def test_haar_start_is_almost_free_of_noise() -> None:
    posterior = built(MagViT.Config()).encode(clips())
    assert posterior.std.max() < 0.1 * posterior.mean.std()


def test_haar_start_learns_a_clip_in_a_few_steps() -> None:
    model, x = built(), clips()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    draws = Keyed(0, 0, torch.arange(2), 2)
    losses = []
    for _ in range(15):
        loss = (model.reconstruct(x, draws).video - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_weights() -> None:
    a, b = built().state_dict(), built().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


# layers


@torch.no_grad()
def test_a_causal_convolution_does_not_read_later_frames() -> None:
    conv, x = CausalConv3d(2, 2, (2, 2)), torch.randn(1, 2, 9, 8, 8)
    changed = x.clone()
    changed[:, :, 5:] += 1
    assert torch.equal(conv(x)[:, :, :3], conv(changed)[:, :, :3])


@torch.no_grad()
def test_upsampling_in_time_is_trilinear_and_keeps_the_first_frame() -> None:
    layer, x = Upsampler(2, (2, 2)), torch.randn(1, 2, 5, 4, 4)
    wide = layer.conv(torch.nn.functional.interpolate(x, scale_factor=(1, 2, 2)))
    rest = torch.nn.functional.interpolate(
        wide[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear", align_corners=False
    )
    torch.testing.assert_close(layer(x), torch.cat([wide[:, :, :1], rest], 2))


def test_tiles_of_a_pointwise_function_leave_no_seam() -> None:
    x = torch.randn(1, 2, 1, 13, 10)
    torch.testing.assert_close(apply_tiled(lambda part: 2 * part, x, 4, 4, 0.25), 2 * x)
