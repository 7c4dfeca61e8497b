"""The Slice VAE against recorded outputs of EasyAnimate, its size, and its contract."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from plugins._blocks.autoencoder3d import CausalConv3d, Upsampler
from plugins.vae.slice import SliceVAE
from sandbox.contracts import Clip, SizeError
from sandbox.data.randomness import Keyed
from tests.golden_easyanimate import GOLDEN, by_rule, facts, near, recorded
from tests.helpers import recipe

SMALL = SliceVAE.Config(ch=8, latent_channels=4)
RECORDED = (1, 9, 16, 25)
TOLERANCE = 5e-6  # of the fixtures


@cache
def golden() -> SliceVAE:
    """The tiny published model with recorded weights."""
    spec = facts("vae_slice")
    known = SliceVAE.Config.__dataclass_fields__
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["config"].items()}
    cfg = SliceVAE.Config(**{k: v for k, v in sizes.items() if k in known})
    model = SliceVAE(replace(cfg, scale_factor=1.0, shift=0.0, start="published")).eval()
    model.load_state_dict(by_rule(model, spec["weight_seed"]))
    return model


def built(cfg: SliceVAE.Config = SMALL) -> SliceVAE:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return SliceVAE(cfg)


def clips(frames: int = 9, size: int = 8) -> Tensor:
    """Smooth coloured clips in [-1, 1]."""
    noise = torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool3d(noise, (1, 5, 5), 1, (0, 2, 2)).mul(3).tanh()


# the published model


@pytest.mark.parametrize("frames", RECORDED)
@torch.no_grad()
def test_moments_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("vae_slice")
    got = golden().encode(fixture[f"in.x_T{frames}"]).stored
    near("moments", got, fixture[f"out.moments_T{frames}"], TOLERANCE)


@pytest.mark.parametrize("frames", RECORDED)
@torch.no_grad()
def test_pixels_equal_the_recorded_ones(frames: int) -> None:
    fixture = recorded("vae_slice")
    mean = fixture[f"out.moments_T{frames}"][:, :4]
    near("pixels", golden().pixels(mean), fixture[f"out.decode_of_mean_T{frames}"], TOLERANCE)


def test_preset_has_the_names_and_shapes_of_magvit() -> None:
    """As published, both have the same parameters."""
    with torch.device("meta"):
        model = SliceVAE(recipe("easyanimate_v2_vae_slice").vae)
    manifest = json.loads((GOLDEN / "easyanimate_v2_vae_magvit.json").read_text())
    want = {k: shape for k, (shape, _) in manifest.items()}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want


# the contract


@pytest.mark.parametrize(
    ("settings", "frames", "latents"),
    [
        ({}, 1, 1),
        ({}, 8, 2),
        ({}, 9, 3),
        ({}, 25, 7),
        ({"mini_batch_encoder": 4, "mini_batch_decoder": 1}, 9, 3),
    ],
)
@torch.no_grad()
def test_frames_follow_the_slices(settings: dict, frames: int, latents: int) -> None:
    model, x = built(replace(SMALL, **settings)), clips(frames)
    assert model.cfg.latents(Clip(*x.shape[1:])) == Clip(4, latents, 2, 2)
    z = model.encode(x).mean
    assert z.shape == (2, 4, latents, 2, 2)
    assert model.pixels(z).shape == x.shape


# 8x8x8 has slices of one latent frame
EIGHT = replace(
    SMALL, ch_mult=(1, 2, 2, 2), down_block_types=("SpatialTemporalDownBlock3D",) * 4,
    up_block_types=("SpatialTemporalUpBlock3D",) * 4, mini_batch_decoder=1, start="published",
)  # fmt: skip
PARITY = replace(EIGHT, first_frame="parity")


@pytest.mark.parametrize(
    ("cfg", "frames", "latents"),
    [
        (PARITY, 1, 1), (PARITY, 16, 2), (PARITY, 17, 3), (PARITY, 32, 4), (PARITY, 33, 5),
        (EIGHT, 1, 1), (EIGHT, 9, 2), (EIGHT, 17, 3), (EIGHT, 33, 5),
        (replace(SMALL, first_frame="parity"), 8, 2), (replace(SMALL, first_frame="parity"), 9, 3),
        (replace(PARITY, mini_batch_encoder=24, mini_batch_decoder=3), 48, 6),
        (replace(PARITY, mini_batch_encoder=24, mini_batch_decoder=3), 49, 7),
    ],
)  # fmt: skip
@torch.no_grad()
def test_slices_of_one_latent_frame_give_back_the_frames(cfg, frames: int, latents: int) -> None:
    assert not list(cfg.problems())
    model, x = built(cfg), clips(frames)
    assert model.cfg.latents(Clip(*x.shape[1:])).frames == latents
    z = model.encode(x).mean
    assert z.shape[2] == latents
    assert model.pixels(z).shape == x.shape


@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_parity_decodes_as_published(latents: int) -> None:
    """The published loop over slices, written out: an odd first frame alone, then neighbours."""
    model = built(PARITY)
    z = torch.randn(1, 4, latents, 1, 1, generator=torch.Generator().manual_seed(0))
    h, decoder, video, before = model.post_quant_conv(z), model.decoder, [], None
    if latents % 2:
        video.append(decoder.upsample(decoder.features(h[:, :, :1]), single_frame=True))
    for i in range(latents % 2, latents):
        here, after = h[:, :, i : i + 1], h[:, :, i + 1 : i + 2]
        parts = [*([] if before is None else [before]), here, *([after] if after.shape[2] else [])]
        features = decoder.features(torch.cat(parts, 2))
        start = 0 if before is None else 1
        video.append(decoder.upsample(features[:, :, start : start + 1]))
        before = here
    want = torch.cat(video, 2)
    assert want.shape[2] == (8 * latents if latents % 2 == 0 else 8 * latents - 7)
    torch.testing.assert_close(model.pixels(z), want)


@torch.no_grad()
def test_parity_changes_nothing_where_slices_have_two_latent_frames() -> None:
    model, by_parity = (built(replace(SMALL, first_frame=x)) for x in ("separate", "parity"))
    for frames in (1, 8, 9, 17):
        x = clips(frames)
        z = model.encode(x).mean
        assert torch.equal(by_parity.encode(x).mean, z)
        assert torch.equal(by_parity.pixels(z), model.pixels(z))


@pytest.mark.parametrize("frames", [0, 8, 9, 10, 24, 25])
def test_frames_that_parity_would_change_are_refused(frames: int) -> None:
    """As published, 9 frames have 2 latents, which give 16 frames."""
    with pytest.raises(SizeError) as error:
        PARITY.latents(Clip(3, frames, 16, 16))
    want = f"frames={frames}: want 16 k + 1, or 16 k (first_frame=parity)"
    assert str(error.value) == want


@pytest.mark.parametrize(
    ("settings", "clip", "message"),
    [
        ({}, Clip(3, 10, 16, 16), "frames=10: want 8 k + 1, or 8 k (k slices)"),
        ({}, Clip(3, 0, 16, 16), "frames=0: want 8 k + 1, or 8 k (k slices)"),
        ({"mini_batch_encoder": 4, "mini_batch_decoder": 1}, Clip(3, 8, 16, 16),
         "frames=8: want 4 k + 1 (k slices)"),
        ({}, Clip(3, 9, 18, 16), "height=18: want a multiple of 4"),
        ({}, Clip(1, 9, 16, 16), "channels=1: want 3"),
    ],
)  # fmt: skip
def test_a_clip_that_does_not_fit_is_refused(settings: dict, clip: Clip, message: str) -> None:
    with pytest.raises(SizeError) as error:
        replace(SMALL, **settings).latents(clip)
    assert str(error.value) == message


def test_latents_that_fill_no_slice_are_refused() -> None:
    model = built(replace(SMALL, mini_batch_encoder=16, mini_batch_decoder=4))
    with pytest.raises(ValueError, match="latents have 6 frames: want 4 k or 4 k \\+ 1"):
        model.pixels(torch.zeros(1, 4, 6, 2, 2))


@torch.no_grad()
def test_slices_are_encoded_independently() -> None:
    model, x = built(), clips(17)
    last = model.encode(x[:, :, 9:]).stored
    torch.testing.assert_close(model.encode(x).stored[:, :, 3:], last)


@pytest.mark.parametrize(("changed", "is_used"), [(0, False), (1, True), (3, True), (5, False)])
@torch.no_grad()
def test_a_slice_is_decoded_with_its_neighbours_only(changed: int, is_used: bool) -> None:
    """Latents 1 and 2 are the first slice (frames 1 to 8); latent 0 is the separate first frame."""
    model = built(replace(SMALL, start="published"))
    z = torch.randn(1, 4, 7, 2, 2, generator=torch.Generator().manual_seed(0))
    other = z.clone()
    other[:, :, changed] += 1
    frames = slice(1, 9)
    assert torch.equal(model.pixels(z)[:, :, frames], model.pixels(other)[:, :, frames]) != is_used


@torch.no_grad()
def test_no_state_is_kept_between_calls() -> None:
    model, z = built(), torch.randn(1, 4, 3, 2, 2)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    first = model.decode(z)
    model.decode(torch.randn(1, 4, 4, 2, 2))
    assert torch.equal(model.decode(z), first)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[k] is v for k, v in before[name].items()), name


@torch.no_grad()
def test_large_frames_are_processed_in_tiles() -> None:
    model = built(replace(SMALL, use_tiling=True, tile_sample_min_size=16))
    x = clips(1, 24)
    untiled = built().encode(x).stored
    assert model.encode(x).stored.shape == untiled.shape
    assert not torch.equal(model.encode(x).stored, untiled)
    assert torch.equal(model.encode(x[..., :16]).stored, built().encode(x[..., :16]).stored)


def test_every_parameter_gets_a_gradient_from_reconstruction() -> None:
    model = built(replace(SMALL, start="published"))
    out = model.reconstruct(clips(), Keyed(0, 0, torch.arange(2), 2))
    (out.video.square().sum() + out.posterior.kl().sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Softmax is invariant to the bias of keys.
    assert [n for n in without if not n.endswith("to_k.bias")] == []


def test_a_few_steps_overfit_a_clip() -> None:
    model, x = built(), clips()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(15):
        out = model.reconstruct(x, Keyed(0, 0, torch.arange(2), 2))
        loss = (out.video - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ch": 0}, "ch=0: want >= 1"),
        ({"ch_mult": ()}, "ch_mult=(): want at least one level"),
        ({"ch_mult": (1, 2)}, "down_block_types has 3 entries: want 2"),
        ({"norm_num_groups": 5}, "norm_num_groups=5: want a divisor of all widths"),
        ({"mid_block_num_attention_heads": 5}, "mid_block_num_attention_heads=5: want a divisor"),
        ({"mid_block_attention_type": "2d"}, "mid_block_attention_type='2d': want one of"),
        ({"start": "pca"}, "start='pca': want one of"),
        ({"latent_channels": 2}, "start='haar' with"),
        ({"down_block_types": ("Down",) * 3}, "down_block_types='Down': want one of"),
        ({"up_block_types": ("SpatialUpBlock3D",) * 3}, "up_block_types multiply (time, space)"),
        ({"mini_batch_encoder": 9}, "mini_batch_encoder=9: want a multiple of 4"),
        ({"mini_batch_decoder": 3}, "mini_batch_decoder=3: want 2, the latent frames of"),
        ({"tile_sample_min_size": 30}, "tile_sample_min_size=30: want a multiple of 4"),
        ({"tile_overlap_factor": 0.3}, "tile_overlap_factor=0.3: tiles of 96 latents"),
        ({"tile_overlap_factor": float("nan")}, "tile_overlap_factor=nan: want 0 to 0.5"),
        ({"scale_factor": 0.0}, "scale_factor=0.0: want > 0"),
        ({"first_frame": "odd"}, "first_frame='odd': want one of"),
    ],
)
def test_a_bad_setting_is_reported(changes: dict, problem: str) -> None:
    problems = list(replace(SliceVAE.Config(), **changes).problems())
    assert any(p.startswith(problem) for p in problems), problems


# layers


@torch.no_grad()
def test_a_centred_convolution_pads_with_zeros() -> None:
    conv, x = CausalConv3d(2, 2, causal=False), torch.randn(1, 2, 5, 4, 4)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1))
    want = torch.nn.functional.conv3d(padded, conv.weight, conv.bias)
    torch.testing.assert_close(conv(x), want)


@torch.no_grad()
def test_upsampling_doubles_frames_except_a_single_frame() -> None:
    layer, x = Upsampler(2, (2, 2), causal=False), torch.randn(1, 2, 2, 4, 4)
    assert layer(x).shape == (1, 2, 4, 8, 8)
    assert layer(x[:, :, :1]).shape == (1, 2, 2, 8, 8)
    assert layer(x[:, :, :1], single_frame=True).shape == (1, 2, 1, 8, 8)
