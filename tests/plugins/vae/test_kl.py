"""The KL autoencoder against recorded outputs of the original, its size and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plugins._blocks.autoencoder2d import AttnBlock, Downsample, ResnetBlock, Upsample
from plugins._blocks.posterior import Gaussian
from plugins.vae.kl import AutoencoderKL
from sandbox.contracts import Clip, SizeError
from sandbox.data.randomness import Keyed, Recorded

GOLDEN = Path(__file__).parents[2] / "golden"
CLIP = (2, 3, 5, 16, 24)
# The published size (Stable Diffusion, DynamiCrafter), which conf/vae/kl_f8.yaml must equal.
KL_F8 = AutoencoderKL.Config(
    ch=128,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    resolution=256,
    num_groups=32,
    scale_factor=0.18215,
    shift=0.0,
)


def filled(system: str, spec: dict) -> dict[str, Tensor]:
    """Weights from the table of a golden folder; see its README."""
    table = load_file(GOLDEN / system / "weights_table.safetensors")["table"]
    state = {}
    for key, (shape, offset, scale, shift) in spec.items():
        index = (offset + torch.arange(torch.Size(shape).numel())) % len(table)
        state[key] = (table[index] * scale + shift).view(shape)
    return state


@pytest.fixture(scope="module")
def golden() -> tuple[dict, dict[str, Tensor], AutoencoderKL]:
    facts = json.loads((GOLDEN / "dynamicrafter/autoencoder_kl.json").read_text())
    sizes = {
        k: tuple(v) if isinstance(v, list) else v for k, v in facts["config"]["ddconfig"].items()
    }
    cfg = AutoencoderKL.Config(**sizes, embed_dim=4, num_groups=32, scale_factor=1.0, shift=0.0)
    model = AutoencoderKL(cfg)
    model.load_state_dict(filled("dynamicrafter", facts["weights"]))
    tensors = load_file(GOLDEN / "dynamicrafter/autoencoder_kl.safetensors")
    return (
        facts,
        {k: v[:, :, None] if v.dim() == 4 else v for k, v in tensors.items()},
        model.eval(),
    )


def near(name: str, got: Tensor, want: Tensor, rtol: float = 2e-5) -> None:
    """Reruns of the original differ by about 2e-6, other orders of summation by a bit more."""
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert got.shape == want.shape and error < rtol, f"{name}: relative error {error:.1e}"


def test_moments_and_posterior_equal_the_original(golden) -> None:
    _, tensors, model = golden
    posterior = model.encode(tensors["in/x"])
    near("moments", posterior.stored, tensors["out/moments"])
    near("mean", posterior.mean, tensors["out/mean"])
    near("logvar", posterior.log_variance, tensors["out/logvar"])
    near("z", posterior.sample(tensors["in/noise"]), tensors["out/z"])
    near("kl", posterior.kl(), tensors["out/kl"])
    near("nll", posterior.nll(tensors["out/z"]), tensors["out/nll"])


def test_decoding_equals_the_original(golden) -> None:
    _, tensors, model = golden
    near("dec", model.decode(tensors["out/z"]), tensors["out/dec"])


def test_gradients_equal_the_original(golden) -> None:
    facts, tensors, model = golden
    posterior = model.encode(tensors["in/x"])
    video = model.decode(posterior.sample(tensors["in/noise"]))
    model.zero_grad()
    (video.square().mean() + 1e-3 * posterior.kl().mean()).backward()
    for name, p in model.named_parameters():
        want, got = facts["grad_check"]["grad_l2"][name], p.grad.norm().item()
        # below 1e-6: zero up to rounding
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    ("name", "block", "suffix"),
    [
        ("vae_resnet", lambda: ResnetBlock(64, 64, 32, 0.0), ""),
        ("vae_resnet", lambda: ResnetBlock(64, 64, 32, 0.0), "_smallx"),
        ("vae_attn", lambda: AttnBlock(64, 32), ""),
        ("vae_attn", lambda: AttnBlock(64, 32), "_smallx"),
        ("vae_down", lambda: Downsample(64), ""),
        ("vae_down", lambda: Downsample(64), "_smallx"),
        ("vae_up", lambda: Upsample(64), ""),
    ],
)
def test_blocks_equal_the_original(name, block, suffix) -> None:
    tensors = load_file(GOLDEN / "ldm/blocks.safetensors")
    module, key = block(), f"out/{name}{suffix}"
    weights = json.loads((GOLDEN / "ldm/blocks.json").read_text())["weights"][name]
    module.load_state_dict(filled("ldm", weights))
    # scaled by 0.01, the inputs show the eps of the group norm
    near(key, module(tensors["in/x"] * (0.01 if suffix else 1)), tensors[key])


def test_published_size_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = AutoencoderKL(KL_F8).state_dict()
    want = json.loads((GOLDEN / "dynamicrafter/kl_f8_keys.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == want
    assert sum(v.numel() for v in state.values()) == 83_653_863


def test_preset_is_the_published_size() -> None:
    from omegaconf import OmegaConf

    from sandbox.config.registry import tuples

    preset = OmegaConf.load(Path(__file__).parents[3] / "conf/vae/kl_f8.yaml")
    del preset["defaults"]
    schema = OmegaConf.structured(AutoencoderKL.Config)
    assert tuples(OmegaConf.to_object(OmegaConf.merge(schema, preset))) == KL_F8


def test_latents_have_the_size_that_the_config_promises() -> None:
    cfg = AutoencoderKL.Config()
    z = AutoencoderKL(cfg).encode(torch.zeros(CLIP)).mean
    assert Clip(*z.shape[1:]) == cfg.latents(Clip(*CLIP[1:]))


@pytest.mark.parametrize(("field", "clip"), [("height", (3, 1, 18, 16)), ("width", (3, 1, 16, 2))])
def test_sizes_that_do_not_divide_are_refused(field, clip) -> None:
    with pytest.raises(SizeError) as error:
        AutoencoderKL.Config().latents(Clip(*clip))
    assert error.value.field == field


def test_every_bad_setting_is_reported() -> None:
    cfg = AutoencoderKL.Config(
        ch=0,
        ch_mult=(1, 3),
        dropout=float("nan"),
        double_z=False,
        attn_resolutions=(5,),
        scale_factor=0.0,
        shift=float("nan"),
        frames_per_pass=0,
        train_frames=0,
        out_ch=1,
    )
    reported = {p.split("=")[0] for p in cfg.problems()}
    bad = {"ch", "dropout", "double_z", "attn_resolutions", "scale_factor", "shift"}
    assert reported == bad | {"frames_per_pass", "train_frames", "out_ch"}


def test_groups_must_divide_every_width() -> None:
    assert list(AutoencoderKL.Config().problems()) == []
    (problem,) = AutoencoderKL.Config(ch=12).problems()
    assert problem.startswith("num_groups=8")


def test_frames_are_independent() -> None:
    torch.manual_seed(0)
    model, x = AutoencoderKL(AutoencoderKL.Config()), torch.randn(CLIP)
    one = model.decode(model.encode(x[:, :, 2:3]).mean)
    # float32 rounding of another batch size
    torch.testing.assert_close(
        model.decode(model.encode(x).mean)[:, :, 2:3], one, rtol=1e-4, atol=1e-5
    )


def test_frames_per_pass_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    model, x = AutoencoderKL(AutoencoderKL.Config()), torch.randn(CLIP)
    unsplit = model.encode(x).stored
    model.cfg = replace(model.cfg, frames_per_pass=3)
    torch.testing.assert_close(model.encode(x).stored, unsplit, rtol=1e-4, atol=1e-5)  # rounding


def test_attention_is_at_the_listed_resolutions() -> None:
    model = AutoencoderKL(AutoencoderKL.Config(attn_resolutions=(8,)))
    assert [len(level.attn) for level in model.encoder.down] == [0, 1, 0]
    assert [len(level.attn) for level in model.decoder.up] == [0, 2, 0]
    assert model.decode(model.encode(torch.zeros(CLIP)).mean).shape == CLIP


def test_decode_inverts_scale_and_shift() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderKL.Config(scale_factor=0.5, shift=1.5))
    z = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(model.scaled(z), (z - 1.5) * 0.5)
    assert torch.equal(model.decode(model.scaled(z)), model.pixels(model.unscaled(model.scaled(z))))


def test_calibrated_latents_have_unit_variance_in_each_channel() -> None:
    torch.manual_seed(0)
    model, x = AutoencoderKL(AutoencoderKL.Config()), torch.randn(4, 3, 3, 16, 16)
    model.calibrate(x.split(2))
    z = model.scaled(model.encode(x).mean)
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-4)
    # the measured deviation is the biased one; 1e-3 covers float32 rounding of small latents
    torch.testing.assert_close(z.std((0, 2, 3, 4), correction=0), torch.ones(4), rtol=1e-3, atol=0)


def test_published_scale_is_neither_measured_nor_stored() -> None:
    model = AutoencoderKL(AutoencoderKL.Config(scale_factor=0.18215, shift=0.0))
    model.calibrate([torch.randn(1, 3, 1, 16, 16)])
    assert (model.scale, model.shift) == (0.18215, 0.0)
    assert not {"scale", "shift"} & set(model.state_dict())


def test_calibration_is_in_the_state_dict() -> None:
    torch.manual_seed(0)
    model, other = (AutoencoderKL(AutoencoderKL.Config()) for _ in range(2))
    model.calibrate([torch.randn(2, 3, 1, 16, 16)])
    other.load_state_dict(model.state_dict())
    z = torch.randn(1, 4, 1, 4, 4)
    assert torch.equal(model.scaled(z), other.scaled(z))


def test_reconstruction_samples_with_the_draw_posterior() -> None:
    torch.manual_seed(0)
    model, x = AutoencoderKL(AutoencoderKL.Config()), torch.randn(2, 3, 1, 16, 16)
    noise = torch.randn(2, 4, 1, 4, 4)
    out = model.reconstruct(x, Recorded({"posterior": noise}))
    assert torch.equal(out.video, model.pixels(out.posterior.sample(noise)))


def test_reconstruction_takes_the_drawn_frames_of_each_clip() -> None:
    model, x = AutoencoderKL(AutoencoderKL.Config(train_frames=2)), torch.randn(CLIP)
    frames = torch.tensor([0, 3])
    out = model.reconstruct(
        x, Recorded({"frames": frames, "posterior": torch.zeros(2, 4, 2, 4, 6)})
    )
    assert torch.equal(out.target, torch.stack([x[0, :, 0:2], x[1, :, 3:5]]))
    assert out.video.shape == out.target.shape


@pytest.mark.parametrize("number", [None, 5, 9])
def test_reconstruction_takes_full_clips_if_there_are_no_more_frames(number) -> None:
    model, x = AutoencoderKL(AutoencoderKL.Config(train_frames=number)), torch.randn(CLIP)
    assert model.reconstruct(x, Keyed(0, 0, torch.arange(2), 2)).target is x


def test_bfloat16_runs() -> None:
    model = AutoencoderKL(AutoencoderKL.Config()).bfloat16()
    draws = Keyed(0, 0, torch.arange(2), 2)
    out = model.reconstruct(torch.zeros(CLIP, dtype=torch.bfloat16), draws)
    assert out.video.dtype == torch.bfloat16 and out.video.shape == out.target.shape


def test_log_variance_is_clamped_as_published() -> None:
    posterior = Gaussian(torch.tensor([0.0, 0.0, -99.0, 99.0]).view(1, 4, 1, 1, 1))
    assert posterior.log_variance.flatten().tolist() == [-30.0, 20.0]


def test_posterior_of_an_odd_channel_count_is_refused() -> None:
    with pytest.raises(ValueError, match="even channel count"):
        Gaussian(torch.zeros(1, 3, 1, 1, 1))


def test_wider_networks_have_a_smaller_learning_rate() -> None:
    assert AutoencoderKL.Config().recipe().lr == 4e-3
    assert KL_F8.recipe().lr == 4e-3 / 8
