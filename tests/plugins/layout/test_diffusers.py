"""Folders of diffusers pipelines: split, join, and as initial weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from plugins.layout.diffusers import Diffusers
from sandbox import build, compose
from sandbox.contracts import StorageError
from sandbox.storage.published import read_model, read_parts
from sandbox.weights.init_from import init_from

LAYOUT = Diffusers(Diffusers.Config())
TINY = (
    "backbone=cogvideox", "backbone.num_layers=1", "backbone.num_attention_heads=1",
    "vae=cogvideox", "vae.block_out_channels=[4,4,4]", "vae.weights=null", "conditioning=t5",
    "logger=null", "kernels=eager",
)  # fmt: skip


def system(*overrides: str, seed: int = 0):
    return build(compose(*TINY, f"seed={seed}", *overrides))


def write(folder: Path, state: dict[str, Tensor], files: int = 1) -> None:
    """A model as diffusers saves it, in one file or in several with an index."""
    folder.mkdir(parents=True)
    names, stem = sorted(state), "diffusion_pytorch_model"
    tensors = {k: v.contiguous().clone() for k, v in state.items()}
    if files == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return
    held = {f"{stem}-{i + 1:05}-of-{files:05}.safetensors": names[i::files] for i in range(files)}
    for file, own in held.items():
        save_file({k: tensors[k] for k in own}, folder / file)
    index = {"weight_map": {k: file for file, own in held.items() for k in own}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def test_split_and_join_are_inverses() -> None:
    names = ("transformer/a.weight", "vae/b.bias", "text_encoder/shared.weight")
    state = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    parts = LAYOUT.split(state)
    assert set(parts) == {"backbone", "vae", "conditioning"}
    assert set(parts["conditioning"]) == {"encoder.shared.weight"}
    assert LAYOUT.join(parts) == state


def test_ema_weights_of_a_training_script_are_taken() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    parts = LAYOUT.split({"transformer/a": one, "transformer_ema/a": two, "vae/b": one})
    assert parts == {"backbone": {"a": two}, "vae": {"b": one}}


def test_unknown_folders_and_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="scheduler/x: want a name in one of transformer"):
        LAYOUT.split({"scheduler/x": torch.zeros(1)})
    with pytest.raises(ValueError, match="loss: diffusers has no folder for it"):
        LAYOUT.join({"loss": {}})


@pytest.mark.parametrize("files", [1, 3])
def test_training_starts_from_the_backbone_of_a_pipeline(tmp_path, files) -> None:
    published = system(seed=1)
    state = published.backbone.state_dict()
    write(tmp_path / "transformer", state, files)
    write(tmp_path / "vae", published.first_stage.state_dict())
    (tmp_path / "scheduler").mkdir()
    started = system(seed=2)
    init_from(started, tmp_path)
    assert all(torch.equal(state[k], v) for k, v in started.backbone.state_dict().items())


def test_training_starts_from_a_folder_with_only_a_backbone(tmp_path) -> None:
    state = system(seed=1).backbone.state_dict()
    write(tmp_path / "transformer", state)
    started = system(seed=2)
    init_from(started, tmp_path / "transformer")
    assert torch.equal(started.backbone.proj_out.weight, state["proj_out.weight"])


def test_half_precision_weights_are_cast_to_the_dtype_of_the_model(tmp_path) -> None:
    state = {k: v.bfloat16() for k, v in system(seed=1).backbone.state_dict().items()}
    write(tmp_path / "transformer", state)
    started = system()
    init_from(started, tmp_path)
    weight = started.backbone.patch_embed.text_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["patch_embed.text_proj.weight"].float())


def test_a_stored_table_is_skipped_if_the_settings_do_not_use_it(tmp_path) -> None:
    published = system("backbone.use_learned_positional_embeddings=true", seed=1)
    write(tmp_path / "transformer", published.backbone.state_dict())
    started = system()
    init_from(started, tmp_path)
    assert torch.equal(started.backbone.proj_out.weight, published.backbone.proj_out.weight)


def test_a_backbone_of_another_size_is_refused_by_name(tmp_path) -> None:
    write(tmp_path / "transformer", system("backbone.num_layers=2").backbone.state_dict())
    with pytest.raises(StorageError, match=r"do not fit[^$]*\(24\): transformer_blocks\.1"):
        init_from(system(), tmp_path)


def test_the_first_stage_is_read_from_the_same_folder(tmp_path) -> None:
    published = system(seed=1)
    state = published.first_stage.state_dict()
    write(tmp_path / "vae", state)
    write(tmp_path / "transformer", published.backbone.state_dict())
    for folder in (tmp_path, tmp_path / "vae"):
        started = system(f"vae.weights={folder}", seed=2)
        assert all(torch.equal(state[k], v) for k, v in started.first_stage.state_dict().items())


def test_broken_and_missing_files_are_named(tmp_path) -> None:
    write(tmp_path / "transformer", {"a": torch.zeros(1), "b": torch.zeros(1)}, 2)
    missing = next((tmp_path / "transformer").glob("*00002-of*"))
    missing.unlink()
    with pytest.raises(StorageError, match=missing.name):
        read_parts(tmp_path, "init_from")
    missing.write_bytes(b"no weights")
    with pytest.raises(StorageError, match="not a readable safetensors file"):
        read_model(tmp_path / "transformer", "init_from")


def test_files_of_an_index_must_be_in_its_folder(tmp_path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match=r"secret.*: cannot be read"):
        read_model(folder, "init_from")
