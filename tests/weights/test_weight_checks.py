"""Wrong weights are refused before a run folder is made, whichever setting names them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sandbox import build, compose
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import StorageError
from sandbox.distributed.rank import Rank
from sandbox.tasks.train import train
from sandbox.tasks.train_vae import train_vae
from sandbox.training.build import check_weights
from sandbox.weights.init_from import init_from
from tests.plugins.conditioning.test_t5 import released

BASE = ("backbone.width=8", "backbone.num_blocks=1", "backbone.time_features=8", "logger=null")
TINY = (*BASE, "vae.weights=null", "conditioning.width=8", "conditioning.buckets=32")
VAE = ("vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]")
CLIP = ("conditioning=openclip", "conditioning.width=16", "conditioning.layers=2",
        "conditioning.heads=2", "conditioning.embed_dim=16")  # fmt: skip


def spoiled(state: dict[str, torch.Tensor], value: float = float("nan")) -> dict[str, torch.Tensor]:
    """A copy with one wrong value in the last float tensor of several values."""
    state = {k: v.detach().clone().contiguous() for k, v in state.items()}
    name = [k for k, v in state.items() if v.is_floating_point() and v.numel() > 1][-1]
    state[name].view(-1)[-1] = value
    return state


def file(state: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def made(name: str, folder: Path) -> tuple[str, ...]:
    """Overrides that name spoiled weights."""
    if name.startswith("backbone"):
        state = spoiled(build(compose(*TINY)).backbone.state_dict())
        content = {"model": state, "epoch": 1} if name.endswith("checkpoint") else state
        suffix = ".ckpt" if name.endswith("checkpoint") else ".safetensors"
        return (*TINY, f"init_from={file(content, folder / f'model{suffix}')}")
    if name == "an infinite weight":
        state = spoiled(build(compose(*TINY)).backbone.state_dict(), float("inf"))
        return (*TINY, f"init_from={file(state, folder / 'model.pt')}")
    if name == "an exported system":
        state = spoiled(build(compose(*TINY)).trainable_state())
        return (*TINY, f"init_from={file(state, folder / 'weights.safetensors')}")
    if name == "a folder of diffusers":
        words = ("backbone=cogvideox", "backbone.num_layers=1", "backbone.num_attention_heads=1",
                 "conditioning=t5", "vae.weights=null", "logger=null")  # fmt: skip
        state = spoiled(build(compose(*words)).backbone.state_dict())
        file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return (*words, f"init_from={folder}")
    if name.startswith("a first stage"):
        state = spoiled(build(compose(*BASE, *VAE, "vae.weights=null")).first_stage.state_dict())
        path = file(state, folder / "vae.safetensors")
        if name.endswith("init_from"):
            return ("task=train_vae", *VAE, "logger=null", f"init_from={path}")
        return (*BASE, *VAE, f"vae.weights={path}")
    if name == "a T5":
        cfg = released(folder / "system")
        place = folder / "system" / "text_encoder"
        part = next(place.glob("*.safetensors"))
        save_file(spoiled(load_file(part)), part)
        sizes = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
        known = [f"conditioning.{k}={getattr(cfg, k)}" for k in sizes if hasattr(cfg, k)]
        return (*BASE, "vae.weights=null", "conditioning=t5", *known,
                f"conditioning.weights={folder / 'system'}")  # fmt: skip
    assert name == "a CLIP"
    words = (*BASE, "vae.weights=null", *CLIP)
    state = spoiled(build(compose(*words)).conditioner.cond_stage_model.model.state_dict())
    return (*words, f"conditioning.weights={file(state, folder / 'clip.safetensors')}")


SETTINGS = {
    "backbone alone": "init_from",
    "backbone in a checkpoint": "init_from",
    "an infinite weight": "init_from",
    "an exported system": "init_from",
    "a folder of diffusers": "init_from",
    "a first stage of vae.weights": "vae.weights",
    "a first stage of init_from": "init_from",
    "a T5": "conditioning.weights",
    "a CLIP": "conditioning.weights",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_value_that_is_not_finite_is_refused_before_a_run_folder_is_made(tmp_path, name):
    out = tmp_path / "out"
    root = compose(*made(name, tmp_path), f"out={out}", f"cache={out}")
    run = {"root": to_container(root), "group": None, "overrides": []}
    want = rf"{SETTINGS[name]}=.*1 of its \d+ tensors have values that are NaN or infinite: "
    with pytest.raises(StorageError, match=want) as e:
        (train_vae if name.endswith("of init_from") else train)(run, Rank())
    assert "(1 of " in str(e.value)
    assert not out.exists()


def test_quantised_weights_are_refused(tmp_path):
    state = {k: v.to(torch.int8) for k, v in build(compose(*TINY)).backbone.state_dict().items()}
    path = file(state, tmp_path / "int8.safetensors")
    with pytest.raises(StorageError, match=r"is int8, not floating point \(quantised\?\)"):
        check_weights(wire(compose(*TINY, f"init_from={path}")))


PREFIXES = ("module.", "_orig_mod.", "model.", "transformer.", "module._orig_mod.model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_init_from_removes_known_prefixes_and_says_so(tmp_path, caplog, prefix):
    other, fresh = build(compose(*TINY, "seed=1")), build(compose(*TINY))
    state = {prefix + k: v for k, v in other.backbone.state_dict().items()}
    with caplog.at_level(logging.INFO):
        init_from(fresh, file({"state_dict": state}, tmp_path / "model.ckpt"))
    own = fresh.backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in other.backbone.state_dict().items())
    assert "removed" in caplog.text


def test_init_from_takes_the_ema_weights_and_says_so(tmp_path, caplog):
    """Case 6."""
    live, fresh = build(compose(*TINY, "seed=1")).backbone.state_dict(), build(compose(*TINY))
    ema = {k: v + 1 for k, v in live.items()}
    with caplog.at_level(logging.INFO):
        init_from(fresh, file({"model": live, "ema": ema}, tmp_path / "model.pt"))
    assert all(torch.equal(fresh.backbone.state_dict()[k], v) for k, v in ema.items())
    assert "EMA (ema) taken, not its live weights" in caplog.text


def test_a_first_stage_with_ema_weights_of_latent_diffusion(tmp_path, caplog):
    """`model_ema.` has names without dots, also those of the loss."""
    one = build(compose(*BASE, *VAE, "vae.weights=null", "seed=1")).first_stage.state_dict()
    ema = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in one.items()}
    extra = {"loss.logvar": torch.ones(1), "model_ema.losslogvar": torch.ones(1)}
    counts = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    path = file({"state_dict": one | ema | extra | counts}, tmp_path / "vae.ckpt")
    with caplog.at_level(logging.INFO):
        found = build(compose(*BASE, *VAE, f"vae.weights={path}")).first_stage.state_dict()
    assert all(torch.equal(found[k], one[k] + 1) for k in one)
    assert "EMA weights (model_ema.) taken" in caplog.text


FILES = {
    "a LoRA": ("transformer.blocks.0.attn.to_q.lora_A.weight", "a LoRA file: use adapter=lora"),
    "another architecture": ("double_blocks.0.img_attn.qkv.weight", "a Flux or HunyuanVideo"),
    "names of diffusers": ("down_blocks.0.resnets.0.conv1.weight", "a UNet of diffusers"),
    "a text encoder": ("text_encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    "an optimizer": ("param_groups", "the state of an optimizer"),
}


@pytest.mark.parametrize("name", FILES)
def test_init_from_says_what_the_file_is(tmp_path, name):
    """H4."""
    key, want = FILES[name]
    path = file({key: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=f"the file seems to be {want}") as e:
        init_from(build(compose(*TINY)), path)
    assert "missing (" in str(e.value) and "not in this model (1)" in str(e.value)


@pytest.mark.parametrize("what", ["a Git LFS pointer", "an HTML page", "the index of weights"])
@pytest.mark.parametrize("setting", ["init_from", "vae.weights"])
def test_the_settings_of_weights_say_what_a_file_is(tmp_path, setting, what):
    """Case 16."""
    contents = {
        "a Git LFS pointer": ("m.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "an HTML page": ("m.ckpt", "<!DOCTYPE html><html>"),
        "the index of weights": ("m.safetensors", json.dumps({"weight_map": {"a": "b"}})),
    }
    name, text = contents[what]
    (tmp_path / name).write_text(text)
    rest = (*BASE, "conditioning.width=8", "conditioning.buckets=32")
    words = TINY if setting == "init_from" else (*rest, *VAE)
    with pytest.raises(StorageError, match=rf"{setting}=.*: not a readable .*: it is {what}"):
        check_weights(wire(compose(*words, f"{setting}={tmp_path / name}")))


def test_the_index_of_a_split_model_is_no_checkpoint_of_ours(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(StorageError, match=f"the index of weights .* its folder: {tmp_path}"):
        check_weights(wire(compose(*TINY, f"init_from={path}")))


FOLDERS = {
    "a LoRA of peft": ("adapter_model.safetensors", "the folder of a LoRA; use adapter=lora"),
    "a LoRA of diffusers": ("pytorch_lora_weights.safetensors", "the folder of a LoRA"),
    "another name": ("model_7.ckpt", r"It has model_7\.ckpt: name one of these"),
    "half precision alone": ("diffusion_pytorch_model.fp16.safetensors", r"It has diff.*fp16"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_init_from_says_what_a_folder_has(tmp_path, name):
    file_name, want = FOLDERS[name]
    file({"a": torch.ones(1)}, tmp_path / file_name)
    with pytest.raises(StorageError, match=want):
        init_from(build(compose(*TINY)), tmp_path)
