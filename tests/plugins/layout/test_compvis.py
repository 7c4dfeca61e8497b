"""layout=compvis: full-size systems against their manifests, dialects, files in and out."""

import json
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from plugins.layout.compvis import CompVis
from sandbox import build, compose
from sandbox.cli.jobs import perform
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, StorageError
from sandbox.model.components import build as build_part
from sandbox.storage import weight_files
from sandbox.storage.first_stage_files import load_weights
from sandbox.training.build import check_weights, initialised_system
from sandbox.weights.init_from import init_from
from sandbox.weights.system_files import check_sources, split
from tests.helpers import preset, recipe, tiny, words

MANIFESTS = Path(__file__).parents[2] / "golden/systems"
FULL_SIZE = {"dynamicrafter_512": "kl_f8", "ldm_celebahq_vq4": "vq_f4"}  # -> its first stage
SMALL = (
    "data.height=32", "data.width=32", "data.frames=3", "data.batch_size=2", "backbone=unet3d",
    "backbone.model_channels=32", "backbone.num_heads=2", "vae=kl", "vae.ch=8",
    "vae.scale_factor=0.18215", "vae.shift=0", "conditioning=dynamicrafter",
    *words("dynamicrafter_512", "schedule"), "loss=ldm", "sampler=ddim", "layout=compvis",
    "logger=null",
)  # fmt: skip


def layout(**settings) -> CompVis:
    return CompVis(CompVis.Config(**settings))


def small(*overrides: str, seed: int = 0):
    """A small DynamiCrafter with random weights, including zero-initialised ones."""
    made = build(compose(*SMALL, "vae.weights=null", *overrides, f"seed={seed}"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return made


@pytest.fixture(scope="module")
def original():
    return small(seed=1)


def written(of, folder: Path, with_ema: bool = False, **settings) -> Path:
    ema = {
        "updates": 3,
        "average": {k: p.detach() + 1 for k, p in of.named_parameters() if p.requires_grad},
    }
    format = layout(**settings)
    state = format.join(split(of, ema if with_ema else None))
    return weight_files.write_pickled(format.file(state, 7), folder / "model.ckpt")


def from_file(path: Path):
    """A system with other weights, but with the frozen modules of the file."""
    return small(f"vae.weights={path}", f"conditioning.weights={path}")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FULL_SIZE))
def test_a_published_system_has_all_its_names_and_shapes(name):
    """No missing or unexpected names; equal shapes, dtypes and parameter counts."""
    want = json.loads((MANIFESTS / f"{name}.json").read_text())
    of = recipe(name)
    chosen = {g: getattr(of, g) for g in ("backbone", "conditioning", "schedule")}
    if of.conditioning.plugin == "conditioning/none":
        del chosen["conditioning"]
    chosen["vae"] = preset("vae", FULL_SIZE[name])
    root = replace(tiny(), **chosen)
    with torch.device("meta"):
        parts = {
            group: build_part(group, root).state_dict() for group in chosen if group != "schedule"
        }
    parts["schedule"] = registry.create(root.schedule).tables()
    if name.startswith("ldm"):
        counters = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(0).int()}
        parts["ema"] = counters | parts["backbone"]
    whole = layout().join(parts)
    got = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in whole.items()}
    assert set(want) - set(got) == set()
    assert set(got) - set(want) == set()
    assert got == want
    back = layout().split(whole)
    assert {part: set(state) for part, state in back.items() if state} == {
        part: set(state) for part, state in parts.items() if state
    }


# --- names ----------------------------------------------------------------------------------------

DIALECTS = ("plain", "deepspeed", "256")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_split_and_join_are_an_exact_round_trip(dialect):
    names = json.loads((MANIFESTS / "ldm_celebahq_vq4.json").read_text())
    names |= dict.fromkeys(
        ("model.diffusion_model.fps_embedding.0.weight",
         "model_ema.diffusion_modelfps_embedding0weight",
         "cond_stage_model.model.ln_final.bias", "embedder.model.ln_final.bias",
         "image_proj_model.latents", "scale_arr")
    )  # fmt: skip
    plain = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
    state = layout(dialect=dialect).join(layout().split(plain))
    assert same(layout(dialect=dialect).join(layout().split(state)), state)
    assert same(layout().join(layout().split(state)), plain)


def test_the_256_model_names_the_fps_embedding_framestride():
    parts = {"backbone": {"fps_embedding.0.weight": torch.ones(1), "out.0.bias": torch.ones(1)}}
    state = layout(dialect="256").join(parts)
    assert "model.diffusion_model.framestride_embed.0.weight" in state
    assert layout().split(state)["backbone"].keys() == parts["backbone"].keys()


def test_deepspeed_names_have_a_prefix_of_sixteen_characters():
    """The original strips them by length."""
    (name,) = layout(dialect="deepspeed").join({"backbone": {"x": torch.ones(1)}})
    assert name[16:] == "model.diffusion_model.x"


def test_a_first_stage_alone_omits_the_weights_of_its_loss():
    state = {"encoder.a": torch.ones(1), "quantize.embedding.weight": torch.ones(1),
             "loss.discriminator.a": torch.ones(1)}  # fmt: skip
    parts = layout().split(state)
    assert parts["vae"].keys() == {"encoder.a", "quantize.embedding.weight"}
    assert not parts["backbone"]


def test_names_of_another_layout_are_refused():
    with pytest.raises(StorageError, match=r"1 names are not those of layout=compvis: strange\.x"):
        layout().split({"strange.x": torch.ones(1), "model.diffusion_model.y": torch.ones(1)})


def test_components_without_a_published_name_are_refused():
    one = torch.ones(1)
    with pytest.raises(StorageError, match=r"cannot store 1 names.*table"):
        layout().join({"conditioning": {"table.weight": one}})
    with pytest.raises(StorageError, match=r"vae\.scale: .*want vae\.scale_factor=NUMBER"):
        layout().join({"vae": {"scale": one, "encoder.conv_in.bias": one}})


def test_a_bad_dialect_is_named():
    (problem,) = CompVis.Config(dialect="klingon").problems()
    assert problem.startswith("dialect=")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_of_every_dialect_initialises_a_system(original, tmp_path, dialect):
    path = written(original, tmp_path, dialect=dialect)
    fresh = from_file(path)
    assert not same(fresh.trainable_state(), original.trainable_state())
    init_from(fresh, path)
    assert same(fresh.state_dict(), original.state_dict())


def test_the_network_gets_the_ema_weights_of_the_file(original, tmp_path):
    path = written(original, tmp_path, with_ema=True)
    fresh = from_file(path)
    init_from(fresh, path)
    for name, tensor in fresh.backbone.named_parameters():
        assert torch.equal(tensor, original.backbone.get_parameter(name) + 1)
    projection = fresh.conditioner.image_proj_model.state_dict()
    assert same(projection, original.conditioner.image_proj_model.state_dict())


def test_an_exported_file_equals_the_original(original, tmp_path):
    path = written(original, tmp_path)
    fresh = from_file(path)
    init_from(fresh, path)
    assert same(layout().join(split(fresh)), weight_files.read(path))


def test_the_file_has_the_structure_that_the_original_unpickles(original, tmp_path):
    plain = torch.load(written(original, tmp_path), weights_only=True)
    assert plain.keys() == {"state_dict", "global_step"}
    deep = torch.load(written(original, tmp_path, dialect="deepspeed"), weights_only=True)
    assert all(k.startswith("_forward_module.") for k in deep["module"])


def test_a_first_stage_is_loaded_from_a_full_system_file(original, tmp_path):
    other = small()
    load_weights(other.first_stage, written(original, tmp_path))
    assert same(other.first_stage.state_dict(), original.first_stage.state_dict())


def test_a_file_can_be_sampled_without_a_run(original, tmp_path):
    path, image = written(original, tmp_path), tmp_path / "image.png"
    Image.new("RGB", (40, 32), "red").save(image)
    root = compose(
        *SMALL, "task=sample", f"init_from={path}", f"vae.weights={path}", f"out={tmp_path}",
        f"conditioning.weights={path}", "prompts=[a bear]", f"images=[{image}]", "sampler.steps=2",
        "recipe=crafter",
    )  # fmt: skip
    assert same(initialised_system(wire(root)).state_dict(), original.state_dict())
    perform(root)
    names = sorted(p.name for p in (tmp_path / "samples" / "crafter").iterdir())
    assert names == ["000-a-bear.mp4", "samples.json", "sheet.png"]


def test_names_and_tables_are_compared_before_anything_is_built(original, tmp_path):
    """Also for a pickle, whose tensors are memory-mapped."""
    path = written(original, tmp_path)
    words = (*SMALL, f"init_from={path}", f"vae.weights={path}", f"conditioning.weights={path}")
    check_weights(wire(compose(*words)))
    with pytest.raises(StorageError, match="names or shapes differ"):
        initialised_system(wire(compose(*words, "backbone.model_channels=64")))
    with pytest.raises(StorageError, match="table scale_arr differs from that of this schedule"):
        initialised_system(wire(compose(*words, "schedule.base_scale=0.3")))


def test_a_missing_name_is_an_error_that_names_it(original, tmp_path):
    path = written(original, tmp_path)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.diffusion_model.out.2.bias"]
    fresh = from_file(path)
    weight_files.write_pickled(content, path)
    with pytest.raises(StorageError, match=r"missing \(1\): backbone\.out\.2\.bias"):
        init_from(fresh, path)


def test_another_schedule_is_an_error_that_names_the_table(original, tmp_path):
    path = written(original, tmp_path)
    fresh = small(f"vae.weights={path}", f"conditioning.weights={path}", "schedule.base_scale=0.3")
    with pytest.raises(StorageError, match="table scale_arr differs from that of this schedule"):
        init_from(fresh, path)


def test_another_first_stage_is_an_error_with_a_fix(original, tmp_path):
    path = written(original, tmp_path)
    fresh = small("vae.weights=null", f"conditioning.weights={path}")
    with pytest.raises(StorageError, match=r"first_stage\..* use vae\.weights="):
        init_from(fresh, path)


def test_no_first_stage_is_trained_if_the_file_has_one(original, tmp_path):
    path = written(original, tmp_path)
    root = compose(*SMALL, "vae.weights=auto", f"init_from={path}")
    with pytest.raises(ConfigError, match=r"use vae\.weights="):
        check_sources(root)


def test_a_file_of_another_system_is_reported_before_vae_weights(original, tmp_path):
    path = written(original, tmp_path)
    words = ("backbone.model_channels=64", "vae.ch=16", "vae.weights=auto", f"init_from={path}")
    parts = r"\(\d+ of backbone=unet3d, \d+ of vae=kl\)"
    with pytest.raises(StorageError, match=f"names or shapes differ from this system {parts}; "):
        check_weights(wire(compose(*SMALL, *words)))


def test_no_code_in_a_pickle_runs(original, tmp_path):
    path, marker = tmp_path / "model.ckpt", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"state_dict": OrderedDict(), "hyper_parameters": Evil()}, path)
    assert pickle.dumps(Evil())
    with pytest.raises(StorageError, match="none of it was run"):
        init_from(original, path)
    assert not marker.exists()


# --- task=export ----------------------------------------------------------------------------------


def test_a_run_is_exported_and_initialises_another(tmp_path):
    from sandbox.tasks.export import Export
    from tests.helpers import train

    wiring = wire(compose(*SMALL, "vae.weights=null", "steps=1", "data.clips_per_epoch=2"))
    trained = train(wiring, tmp_path / "runs")
    to = tmp_path / "out.ckpt"
    cfg = Export.Config(run=str(trained.folder), to=str(to), weights="both")
    assert Export(cfg)(wiring)["file"] == str(to)
    parts = layout().split(weight_files.read(to))
    assert parts["ema"]["num_updates"].item() == 1
    assert parts["ema"]["num_updates"].dtype == torch.int32
    assert same(parts["backbone"], dict(trained.system.backbone.state_dict()))
    assert same(parts["vae"], dict(trained.system.first_stage.state_dict()))


def test_an_export_in_the_original_format_needs_a_layout():
    from sandbox.tasks.export import Export

    wiring = SimpleNamespace(root=SimpleNamespace(layout=None))
    with pytest.raises(ConfigError, match="layout=null"):
        Export(Export.Config(run="x"))(wiring)
