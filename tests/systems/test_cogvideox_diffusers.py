"""CogVideoX beside diffusers, an independent judge: its folders in, its numbers, and back out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sandbox import build
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Conditions
from sandbox.data.randomness import Recorded
from sandbox.model.sampling import denoise
from sandbox.storage import weight_files
from sandbox.weights.init_from import init_from
from tests.helpers import composed, words

diffusers = pytest.importorskip("diffusers")

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 24, "text_embed_dim": 20, "num_layers": 2, "max_text_seq_length": 6,
    "sample_height": 8, "sample_width": 12, "sample_frames": 9,
}  # fmt: skip
NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "timestep_spacing": "trailing",
    "snr_shift_scale": 3.0,
}  # fmt: skip
CLIP = ("data.frames=9", "data.height=64", "data.width=96")
NEAR = {"atol": 1e-4, "rtol": 1e-4}  # a trajectory of tiny steps in float32


def theirs(rotary: bool = False) -> Any:
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        **SIZES, use_rotary_positional_embeddings=rotary
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def their_vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=64, sample_width=96, scaling_factor=0.7,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline's folder as diffusers saves it, the transformer in several files."""
    place = tmp_path_factory.mktemp("pipeline")
    theirs().save_pretrained(place / "transformer", max_shard_size="50KB")
    their_vae().save_pretrained(place / "vae")
    assert (place / "transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    return place


def ours(folder: Path, *overrides: str) -> Any:
    sizes = {k: v for k, v in SIZES.items() if not k.startswith(("text", "max", "in_", "out_"))}
    system = build(wire(composed(
        *CLIP, "vae=cogvideox", "vae.block_out_channels=[4,4,8,8]", "vae.latent_channels=4",
        "vae.norm_num_groups=2", "vae.scaling_factor=0.7", f"vae.weights={folder}",
        "backbone=cogvideox", "backbone.patch_size=2", "backbone.vector_dim=0",
        "backbone.use_rotary_positional_embeddings=false",
        *(f"backbone.{k}={v}" for k, v in sizes.items()),
        "conditioning=t5", "conditioning.d_model=20", "conditioning.length=6", "kernels=eager",
        "logger=null", *words("cogvideox_2b_sft", "schedule"), f"init_from={folder}", *overrides,
    )))  # fmt: skip
    if system.adapter is None:
        init_from(system, folder)
    return system.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """(frames-first noise, text, text of no caption)."""
    generator = torch.Generator().manual_seed(1)
    shapes = (1, 3, 4, 8, 12), (1, 6, 20), (1, 6, 20)
    z, text, empty = (torch.randn(s, generator=generator) for s in shapes)
    return z, text, empty


@torch.no_grad()
def their_samples(name: str, steps: int, noises: list[Tensor], monkeypatch: Any) -> Tensor:
    """The loop of diffusers' CogVideoX pipeline, with known noise."""
    from diffusers.schedulers import scheduling_dpm_cogvideox

    kind = {"ddim": "CogVideoXDDIMScheduler", "cogvideox_dpm": "CogVideoXDPMScheduler"}[name]
    model, scheduler = theirs(), getattr(diffusers, kind)(**NOISE)
    scheduler.set_timesteps(steps)
    z, text, empty = inputs()
    old = None
    for i, t in enumerate(scheduler.timesteps):
        both = torch.cat((z, z)), torch.cat((empty, text)), t.expand(2)
        uncond, full = model(*both, return_dict=False)[0].chunk(2)
        guidance = 6.0
        if name == "cogvideox_dpm":
            turn = math.pi * ((steps - t.item()) / steps) ** 5.0
            guidance = 1 + 6.0 * (1 - math.cos(turn)) / 2
        out = uncond + guidance * (full - uncond)
        if name == "ddim":
            z = scheduler.step(out, t, z, return_dict=False)[0]
            continue
        monkeypatch.setattr(
            scheduling_dpm_cogvideox, "randn_tensor", lambda *_, n=i, **__: noises[n]
        )
        back = scheduler.timesteps[i - 1] if i else None
        z, old = scheduler.step(out, old, t, back, z, return_dict=False)
    return z


@pytest.mark.parametrize("steps", [5, 7, 11])
@pytest.mark.parametrize(
    ("name", "guidance"), [("ddim", "cfg"), ("cogvideox_dpm", "cogvideox_dynamic")]
)
def test_samples_equal_those_of_the_pipeline(folder, monkeypatch, name, guidance, steps) -> None:
    z, text, empty = inputs()
    noises = [
        torch.randn(z.shape, generator=torch.Generator().manual_seed(i)) for i in range(steps)
    ]
    named = "cogvideox_2b_sft" if name == "ddim" else "cogvideox_5b_sft"
    system = ours(folder, *words(named, "sampler", "guidance"))
    draws = Recorded({f"sampler_noise_{i}": n.transpose(1, 2) for i, n in enumerate(noises)})
    full, dropped = system.guidance.passes(("text",))
    passes = [(full, Conditions(context=text)), (dropped, Conditions(context=empty))]
    got = denoise(
        system.backbone, system.schedule, system.guidance, passes, system.sampler,
        z.transpose(1, 2).contiguous(), steps, draws,
    )  # fmt: skip
    want = their_samples(name, steps, noises, monkeypatch)
    torch.testing.assert_close(got.transpose(1, 2), want, **NEAR)


@torch.no_grad()
def test_the_first_stage_equals_that_of_the_folder(folder) -> None:
    vae, system = their_vae(), ours(folder)
    x = torch.rand(1, 3, 17, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    want = vae.encode(x).latent_dist
    got = system.first_stage.encode(x)
    torch.testing.assert_close(got.stored, want.parameters, **NEAR)
    z = want.mean * 0.7
    torch.testing.assert_close(system.first_stage.decode(z), vae.decode(z / 0.7).sample, **NEAR)


@torch.no_grad()
def test_trained_weights_load_in_diffusers_as_they_are(folder, tmp_path) -> None:
    system = ours(folder)
    for parameter in system.backbone.parameters():
        parameter.add_(0.01)  # stands for training
    layout = registry.create(registry.default("layout", "diffusers"))
    state = layout.join({"backbone": system.backbone.state_dict()})
    own = {k.removeprefix("transformer/"): v for k, v in state.items()}
    place = tmp_path / "transformer"
    weight_files.write(own, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text((folder / "transformer/config.json").read_text())
    loaded = diffusers.CogVideoXTransformer3DModel.from_pretrained(place).eval()
    z, text, _ = inputs()
    want = system.backbone(z.transpose(1, 2), torch.tensor([500]), Conditions(context=text))
    got = loaded(z, text, torch.tensor([500]), return_dict=False)[0]
    torch.testing.assert_close(got, want.transpose(1, 2), **NEAR)


@torch.no_grad()
def test_a_lora_has_the_same_strength_in_diffusers_and_comes_back(folder, tmp_path) -> None:
    pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    lora = ("adapter=lora", "adapter.rank=4")
    system, (z, text, _), t = ours(folder, *lora, "adapter.alpha=2"), inputs(), torch.tensor([500])
    for name, weight in system.backbone.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    want = system.backbone(z.transpose(1, 2), t, Conditions(context=text)).transpose(1, 2)
    name, state, header = system.adapter.exported(system.backbone)
    save_file(
        {k: v.contiguous() for k, v in state.items()}, tmp_path / name, {"format": "pt", **header}
    )

    model = theirs()
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=their_vae(), transformer=model,
        scheduler=diffusers.CogVideoXDDIMScheduler(**NOISE),
    )  # fmt: skip
    before = model(z, text, t, return_dict=False)[0]
    pipeline.load_lora_weights(tmp_path, weight_name=name)
    got = model(z, text, t, return_dict=False)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - before).abs().max() > 1e-3

    (adapter,) = model.peft_config
    diffusers.CogVideoXPipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(model, adapter_name=adapter),
        transformer_lora_adapter_metadata=model.peft_config[adapter].to_dict(),
    )
    again = ours(folder, *lora, f"adapter.weights={tmp_path / 'theirs' / name}")
    back = again.backbone(z.transpose(1, 2), t, Conditions(context=text)).transpose(1, 2)
    torch.testing.assert_close(back, want, atol=1e-5, rtol=1e-5)


def test_settings_of_a_released_config_are_settings_here(folder) -> None:
    released = json.loads((folder / "transformer/config.json").read_text())
    own = set(vars(ours(folder).root.backbone))
    fixed = {  # the same in all five, and not to be changed here
        "activation_fn", "attention_bias", "dropout", "flip_sin_to_cos", "freq_shift",
        "norm_elementwise_affine", "patch_bias", "timestep_activation_fn",
    }  # fmt: skip
    assert {k for k in released if not k.startswith("_")} - own == fixed
