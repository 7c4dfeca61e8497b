"""DC-AE against diffusers, its published sizes and settings, and its contract."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC as Theirs
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from plugins._blocks.dc_autoencoder import LinearAttention
from plugins.vae.dc_ae import AutoencoderDC, Level
from sandbox.contracts import Clip, SizeError
from sandbox.storage.first_stage_files import matching_weights
from tests.helpers import preset

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32; sums in another order
VIT = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
SANA = AutoencoderDC.Config(  # all levels have layers, attention with two scales
    latent_channels=8, encoder_block_types=VIT, decoder_block_types=VIT,
    encoder_layers_per_block=(1, 1, 2), decoder_layers_per_block=(1, 2, 1),
    encoder_qkv_multiscales=(0, 5, 3), decoder_qkv_multiscales=(0, 5, 3),
    downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.4,
)  # fmt: skip
IN = AutoencoderDC.Config(  # the first level is one convolution; batch norms
    latent_channels=16, encoder_layers_per_block=(0, 1, 1), decoder_layers_per_block=(0, 1, 2),
    encoder_qkv_multiscales=(0,), decoder_qkv_multiscales=(0,),
    decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
    decoder_act_fns=("relu", "relu", "silu"), scaling_factor=0.3,
)  # fmt: skip


def published(cfg: AutoencoderDC.Config) -> Theirs:
    """The network of diffusers with random weights."""
    fields = cfg.__dataclass_fields__
    shared = ("latent_channels", "attention_head_dim", "scaling_factor")
    ours = ("encoder_", "decoder_", "upsample_", "downsample_", *shared)
    settings = {name: getattr(cfg, name) for name in fields if name.startswith(ours)}
    for part in ("encoder", "decoder"):
        kernels = [[level.scale] if level.scale else [] for level in cfg.levels(part)]
        settings[f"{part}_qkv_multiscales"] = kernels
    for name in ("decoder_norm_types", "decoder_act_fns"):
        settings[name] = settings[name][0] if len(settings[name]) == 1 else settings[name]
    return randomised(Theirs(**settings))


def randomised(module: nn.Module) -> Any:
    """Other weights and statistics than those of the initialisation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator)
                x.copy_(noise.abs() + 0.5 if "running_var" in name else noise * 0.2 + (x == 1))
    return module.eval()


def video(frames: int = 2, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("cfg", [SANA, IN], ids=["sana", "in"])
@torch.no_grad()
def test_it_equals_diffusers(cfg: AutoencoderDC.Config) -> None:
    """With its names, in both directions, on images of any size."""
    assert not list(cfg.problems())
    theirs, ours = published(cfg), AutoencoderDC(cfg)
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    x = video()
    z = ours.encode(x).mean
    want = torch.stack([theirs.encode(frame).latent for frame in x.unbind(2)], 2)
    torch.testing.assert_close(z, want, **CLOSE)
    want = torch.stack([theirs.decode(frame).sample for frame in z.unbind(2)], 2)
    torch.testing.assert_close(ours.decode(ours.scaled(z)), want, **CLOSE)


NAMES = (  # patterns of our names, and the official ones
    (r"^(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\d+)\.", r"\1.stages.\3.op_list.\4."),
    (r"(op_list\.\d+)\.(conv\d)\.", r"\1.main.\2.conv."),
    (r"(op_list\.\d+)\.norm\.", r"\1.main.conv2.norm."),
    (r"attn\.to_qkv_multiscale\.0\.proj_in\.", "context_module.main.aggreg.0.0."),
    (r"attn\.to_qkv_multiscale\.0\.proj_out\.", "context_module.main.aggreg.0.1."),
    (r"attn\.to_out\.", "context_module.main.proj.conv."),
    (r"attn\.norm_out\.", "context_module.main.proj.norm."),
    (r"conv_out\.conv_(\w+)\.", r"local_module.main.\1_conv.conv."),
    (r"conv_out\.norm\.", "local_module.main.point_conv.norm."),
    (r"^encoder\.conv_out\.", "encoder.project_out.op_list.0.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"^decoder\.conv_out\.", "decoder.project_out.op_list.2.conv."),
    (r"\.conv_in\.", ".project_in.conv."),
    (r"(stages\.\d+\.op_list\.\d+)\.conv\.", r"\1.main.conv."),
)


def official(state: dict[str, Tensor], nested: bool) -> dict[str, Tensor]:
    """Weights under the official names; `nested`: resampling layers hold a convolution layer."""
    found = {}
    for name, weight in state.items():
        if name.endswith(("to_k.weight", "to_v.weight")):
            continue
        new = name
        for pattern, text in NAMES:
            new = re.sub(pattern, text, new)
        if nested:
            new = new.replace(".main.conv.", ".main.conv.conv.")
        if name.endswith("to_q.weight"):
            parts = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            new, weight = new.replace("attn.to_q", "context_module.main.qkv.conv"), torch.cat(parts)
        found[new] = weight[..., None, None] if re.search(r"(qkv|proj)\.conv\.", new) else weight
    return found


@pytest.mark.parametrize("cfg", [SANA, IN], ids=["sana", "in"])
def test_official_weights_are_translated(tmp_path: Path, cfg: AutoencoderDC.Config) -> None:
    """As by diffusers, whose function is the judge of the official names in this test."""
    model = AutoencoderDC(cfg)
    own = model.state_dict()
    theirs = official(own, nested=cfg is IN)
    converted = convert_autoencoder_dc_checkpoint_to_diffusers(dict(theirs))
    save_file({k: x.contiguous() for k, x in theirs.items()}, tmp_path / "official.safetensors")
    read = matching_weights(model, tmp_path / "official.safetensors")  # vae.weights=FILE
    for found in (converted, read, model.from_published(theirs), model.from_published(own)):
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("name", "count", "latents"),
    [
        ("dc_ae_f32c32_sana", 312_250_275, Clip(32, 1, 32, 32)),
        ("dc_ae_f32c32", 323_356_460, Clip(32, 1, 32, 32)),
        ("dc_ae_f64c128", 676_896_140, Clip(128, 1, 16, 16)),
        ("dc_ae_f128c512", 1_120_682_252, Clip(512, 1, 8, 8)),
    ],
)
def test_presets_have_the_published_number_of_parameters(
    name: str, count: int, latents: Clip
) -> None:
    cfg = preset("vae", name)
    assert not list(cfg.problems())
    with torch.device("meta"):
        model = AutoencoderDC(cfg)
    assert sum(p.numel() for p in model.parameters()) == count
    assert cfg.latents(Clip(3, 1, 1024, 1024)) == latents


@torch.no_grad()
def test_linear_and_quadratic_attention_are_one_function() -> None:
    attention = randomised(LinearAttention(Level("EfficientViTBlock", 16, 1, scale=3), 8))
    q, k, v = (torch.rand(2, 3, 8, 30) for _ in range(3))
    linear = attention.attend(q, k, v)
    attention.head_dim = 30
    torch.testing.assert_close(attention.attend(q, k, v), linear, **CLOSE)


@torch.no_grad()
def test_frames_are_independent() -> None:
    model, x = randomised(AutoencoderDC(SANA)).double(), video(3).double()
    alone = model.encode(x[:, :, 1:2]).mean
    torch.testing.assert_close(model.encode(x).mean[:, :, 1:2], alone, **CLOSE)
    limited = AutoencoderDC(replace(SANA, frames_per_pass=1)).double().eval()
    limited.load_state_dict(model.state_dict())
    torch.testing.assert_close(limited.encode(x).mean, model.encode(x).mean, **CLOSE)


def test_the_shortcuts_keep_the_size_of_a_signal() -> None:
    """With convolutions of zero the encoder averages pixels; the decoder repeats latents."""
    cfg = AutoencoderDC.Config(
        latent_channels=4, encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4), attention_head_dim=4,
    )  # fmt: skip
    model = AutoencoderDC(cfg).eval()
    with torch.no_grad():
        for p in [*model.encoder.down_blocks.parameters(), *model.encoder.conv_out.parameters()]:
            p.zero_()
        x = video()[:, :, 0]
        first = model.encoder.conv_in(x)
        z = model.encoder(x)
    torch.testing.assert_close(z.mean((2, 3)).mean(1), first.mean((1, 2, 3)), **CLOSE)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"encoder_layers_per_block": (1, 0, 1)}, "encoder_layers_per_block"),
        ({"encoder_block_types": ("ResBlock", "ResBlock")}, "2 entries; want one, or 3"),
        ({"decoder_block_out_channels": (16, 32, 24)}, "24 channels after 32: want a divisor"),
        ({"encoder_block_out_channels": (16, 32, 40)}, "multiple of latent_channels=16"),
        ({"decoder_act_fns": ("tanh",)}, "decoder_act_fns"),
        ({"encoder_qkv_multiscales": (0, 0, 4)}, "odd kernel size"),
        ({"attention_head_dim": 64}, "at least attention_head_dim=64"),
        ({"decoder_block_out_channels": (16, 32)}, "want 3 levels"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], problem: str) -> None:
    found = list(replace(AutoencoderDC.Config(), **changes).problems())
    assert any(problem in p for p in found), found


def test_sizes_without_whole_cells_are_refused() -> None:
    with pytest.raises(SizeError, match="height"):
        AutoencoderDC(SANA).encode(video(height=18))
