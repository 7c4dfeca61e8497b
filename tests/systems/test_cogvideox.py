"""CogVideoX as a system: the official fine-tuning loss, replayed through the training step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sandbox.config import registry
from sandbox.config.wiring import Wiring
from sandbox.contracts import Batch, Clip, Slots, Tokens
from sandbox.data.randomness import Recorded
from sandbox.model.components import build_parts
from sandbox.model.latent_diffusion import LatentDiffusion
from tests.helpers import composed, words

GOLDEN = Path(__file__).parents[1] / "golden/cogvideox"
VARIANTS = {"2b": "2b", "5b_i2v": "5b", "1_5_5b": "5b", "1_5_5b_i2v": "5b"}  # -> schedule


def weights(variant: str) -> tuple[dict[str, Tensor], dict]:
    path = GOLDEN / f"transformer_{variant}.safetensors"
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["meta"])["config"]
    state = load_file(path)
    return {k[11:]: v for k, v in state.items() if k.startswith("state_dict/")}, settings


def system(variant: str) -> LatentDiffusion:
    """The tiny published transformer in a system whose pixels are the recorded latents."""
    state, settings = weights(variant)
    root = composed(
        "backbone=cogvideox", "conditioning=t5", "vae=identity", "kernels=eager",
        *words(f"cogvideox_{VARIANTS[variant]}_sft", "schedule"),
        *words("cogvideox_2b_sft", "sampler"), "logger=null",
    )  # fmt: skip
    known = {k: v for k, v in settings.items() if k in vars(root.backbone)}
    backbone = replace(root.backbone, **known, vector_dim=0)  # counted, as official fine-tuning
    image = variant.endswith("i2v")
    conditioning = replace(
        root.conditioning, weights="cached", drop_text=0.0, d_model=20, length=6,
        image="first_frame" if image else "none", image_noise_mean=None,
        ofs=2.0 if backbone.ofs_embed_dim else None,
    )  # fmt: skip
    root = replace(root, backbone=backbone, conditioning=conditioning)
    wiring = Wiring(root, (), (), (), (Slots(context=Tokens(20, 6)),))
    made = LatentDiffusion(wiring, build_parts(wiring), 2)
    made.backbone.load_state_dict(state)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_those_of_official_fine_tuning(variant: str) -> None:
    want = {
        k.removeprefix(f"{variant}/"): v
        for k, v in load_file(GOLDEN / "train_loss.safetensors").items()
        if k.startswith(f"{variant}/")
    }
    model = system(variant)
    batch = Batch(
        video=want["latents_BCFHW"],
        image=want.get("image_latents_scaled_BC1HW"),
        text=want["prompt_embeds"],
        ids=["0", "1"],
    )
    draws = Recorded(
        {"t": want["timesteps"], "noise": want["noise_BFCHW"].transpose(1, 2),
         "drop_text": torch.ones(2)}
    )  # fmt: skip
    calls = []
    model.backbone.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    terms = model.step(batch, draws)
    terms.total.backward()
    ((z_t, _, conditions), out), channels = calls[0], want["latents_BCFHW"].shape[1]
    network_input = torch.cat([z_t] if conditions.concat is None else [z_t, conditions.concat], 1)
    for mine, theirs in ((network_input, "model_input"), (out, "model_output_v")):
        torch.testing.assert_close(mine.transpose(1, 2), want[theirs], atol=1e-5, rtol=1e-4)
    assert out.shape[1] == channels
    torch.testing.assert_close(terms.total, want["loss"][0], rtol=1e-4, atol=0)
    own = dict(model.backbone.named_parameters())
    for name in (k[5:] for k in want if k.startswith("grad/")):
        torch.testing.assert_close(
            own[name].grad,
            want[f"grad/{name}"],
            atol=1e-5,
            rtol=1e-3,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(
    ("variant", "data", "vae"),
    [
        ("2b", "data.frames=49 data.height=480 data.width=720", "cogvideox_2b"),
        ("5b", "data.frames=49 data.height=480 data.width=720", "cogvideox_5b"),
        ("5b_i2v", "data.frames=49 data.height=480 data.width=720", "cogvideox_5b"),
        ("1_5_5b", "data.frames=81 data.height=768 data.width=1360", "cogvideox_5b"),
        ("1_5_5b_i2v", "data.frames=81 data.height=768 data.width=1360", "cogvideox_5b"),
    ],
)
def test_published_presets_wire_with_one_another(variant: str, data: str, vae: str) -> None:
    from sandbox.config.wiring import wire

    named = f"cogvideox_{variant}_{'lora' if variant.endswith('i2v') else 'sft'}"
    root = composed(
        "data=video_folder", "data.root=somewhere", *data.split(), f"vae={vae}",
        *words(named, "backbone", "schedule"), *words("cogvideox_2b_sft", "sampler"), "logger=null",
        *(w for w in words(named, "conditioning") if not w.startswith("conditioning.weights")),
        "conditioning.weights=somewhere",
    )  # fmt: skip
    (grid,) = wire(root).grids
    frames = 22 if variant.startswith("1_5") else 13
    assert grid == Clip(16, frames, *((96, 170) if frames == 22 else (60, 90)))
    assert registry.find("backbone/cogvideox").error is None
