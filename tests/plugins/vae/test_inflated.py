"""3-D autoencoders start from the weights of a 2-D one, and then give the same result on images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from sandbox.config import registry
from sandbox.contracts import StorageError
from sandbox.storage.first_stage_files import init_first_stage
from tests.helpers import preset
from tests.inputs import tensor

LEVELS = (1, 2, 2)
KINDS = ("magvit", "slice")


def autoencoder_2d():
    """A tiny KL-f8 with two residual blocks per level, as published."""
    cfg = registry.default("vae", "kl")
    torch.manual_seed(0)
    sizes = {"ch": 8, "ch_mult": LEVELS, "num_res_blocks": 2, "num_groups": 4, "embed_dim": 4}
    return registry.create(replace(cfg, **sizes, scale_factor=1.0, shift=0.0)).eval()


def autoencoder_3d(kind: str, **settings):
    cfg = registry.default("vae", kind)
    sizes = {"ch": 8, "ch_mult": LEVELS, "layers_per_block": 2, "norm_num_groups": 4}
    more = {"latent_channels": 4, "start": "published", "scale_factor": 1.0, "shift": 0.0}
    return registry.create(replace(cfg, **(sizes | more | settings))).eval()


def in_diffusers(state):
    """The same weights with the names of diffusers' AutoencoderKL."""
    out = {}
    for name, weight in state.items():
        for ours, theirs in (
            (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
            (".mid.attn_1.", ".mid_block.attentions.0."), (".norm_out.", ".conv_norm_out."),
            (".nin_shortcut.", ".conv_shortcut."), (".downsample.", ".downsamplers.0."),
            (".upsample.", ".upsamplers.0."), (".block.", ".resnets."),
            ("encoder.down.", "encoder.down_blocks."), ("0.norm.", "0.group_norm."),
            ("0.q.", "0.to_q."), ("0.k.", "0.to_k."), ("0.v.", "0.to_v."),
            ("0.proj_out.", "0.to_out.0."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        if name.startswith("decoder.up."):
            number, _, rest = name.removeprefix("decoder.up.").partition(".")
            name = f"decoder.up_blocks.{len(LEVELS) - 1 - int(number)}.{rest}"
        is_matrix = ".attentions." in name and weight.ndim == 4
        out[name] = weight[:, :, 0, 0].contiguous() if is_matrix else weight
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [dict, in_diffusers], ids=["compvis", "diffusers"])
def test_images_give_the_same_result(tmp_path, kind, names):
    image, clip = autoencoder_2d(), autoencoder_3d(kind)
    loss = {"loss.logvar": torch.zeros(1)}  # weights of the training loss are ignored
    save_file(names(image.state_dict()) | loss, tmp_path / "vae.safetensors")
    init_first_stage(clip, tmp_path / "vae.safetensors")
    x = tensor(2, 3, 1, 16, 16)
    torch.testing.assert_close(clip.encode(x).mean, image.encode(x).mean, atol=1e-5, rtol=1e-5)
    z = tensor(2, 4, 1, 4, 4)
    torch.testing.assert_close(clip.pixels(z), image.pixels(z), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_causal_kernels_initially_do_not_mix_frames():
    """Norms and attention still cover the full window."""
    clip = autoencoder_3d("magvit")
    state = clip.from_published(autoencoder_2d().state_dict())
    kernels = {k: v for k, v in state.items() if v.ndim == 5 and v.shape[2] == 3}
    assert len(kernels) > 20
    assert not any(v[:, :, :2].any() for v in kernels.values())


def test_the_published_size_accepts_stable_diffusions_autoencoder():
    """Names and shapes of kl-f8 become those of MagViT."""
    with torch.device("meta"):
        image = registry.create(preset("vae", "kl_f8"))
        clip = registry.create(preset("vae", "magvit_easyanimate_v2"))
        state = clip.from_published(image.state_dict())
    own = clip.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}


def test_another_depth_is_refused(tmp_path):
    save_file(autoencoder_2d().state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(StorageError, match=r"weights do not fit this model[^$]*decoder\.up_blocks"):
        init_first_stage(autoencoder_3d("magvit", layers_per_block=1), tmp_path / "vae.safetensors")
