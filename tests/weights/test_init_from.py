"""init_from: weights only, strict, from every kind of file and folder."""

import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sandbox import build, compose
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, SandboxError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run
from sandbox.storage import checkpoint, weight_files
from sandbox.storage.first_stage_files import cache_path
from sandbox.tasks.train import train
from sandbox.tasks.train_vae import train_vae
from sandbox.training.build import build_system, check_weights
from sandbox.weights.init_from import check_first_stage, init_from

STEP = 7
TINY = ("vae.weights=null", "backbone.width=8", "backbone.num_blocks=1", "backbone.time_features=8",
        "conditioning.width=8", "conditioning.buckets=32", "logger=null")  # fmt: skip


def system(*overrides: str, seed: int = 0):
    """A small system that is built in milliseconds."""
    return build(compose(*TINY, *overrides, f"seed={seed}"))


def weights(of) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in of.trainable_state().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained():
    """Stands for a trained system: other weights than a fresh one."""
    return system(seed=1)


def averages(of) -> dict[str, torch.Tensor]:
    return {k: p.detach() + 1 for k, p in of.named_parameters() if p.requires_grad}


def save(of, folder: Path, average: dict | None = None) -> Path:
    """A run folder with one checkpoint of the system `of`."""
    ema = None if average is None else {"updates": 3, "average": average}
    state = {
        "step": STEP,
        "weights": of.trainable_state(),
        "ema": ema,
        "optimizer": {},
        "loader": {},
        "frozen": of.frozen_hashes(),
    }
    run = Run(folder)
    checkpoint.save(run.checkpoints, state, STEP)
    run.config_file.write_text("seed: 1\n")
    return folder


def test_a_run_folder_gives_the_weights_of_its_newest_checkpoint(trained, tmp_path):
    fresh = system()
    assert not same(weights(fresh), weights(trained))
    init_from(fresh, save(trained, tmp_path / "run"))
    assert same(weights(fresh), weights(trained))


def test_averaged_weights_are_taken_where_there_are_any(trained, tmp_path):
    fresh = system()
    init_from(fresh, save(trained, tmp_path / "run", averages(trained)))
    assert same(weights(fresh), weights(trained) | averages(trained))


def test_one_checkpoint_can_be_named(trained, tmp_path):
    fresh = system()
    init_from(fresh, checkpoint.newest(save(trained, tmp_path / "run") / "checkpoints"))
    assert same(weights(fresh), weights(trained))


def test_exported_weights_can_be_named_also_with_another_first_stage(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    weight_files.write(trained.trainable_state(), path, trained.first_stage_hash())
    fresh = system()
    check_first_stage(fresh, path)
    with torch.no_grad():
        fresh.first_stage.first.mean.add_(1)
    fresh.forget_hashes()
    init_from(fresh, path)
    assert same(weights(fresh), weights(trained))
    with pytest.raises(StorageError, match=r"another first stage than this one.*vae\.weights="):
        check_first_stage(fresh, path)  # as task=sample does, which decodes with it


def test_it_says_that_this_is_no_resume(trained, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        init_from(system(), save(trained, tmp_path / "run"))
    assert "step 0" in caplog.text and "resume.run" in caplog.text


def test_another_first_stage_is_refused_with_the_cure(trained, tmp_path):
    fresh = system()
    with torch.no_grad():
        fresh.first_stage.first.mean.add_(1)
    before = weights(fresh)
    with pytest.raises(StorageError, match=r"first_stage.*vae.weights"):
        init_from(fresh, save(trained, tmp_path / "run"))
    assert same(weights(fresh), before)


def test_a_run_of_a_first_stage_is_refused_with_the_setting_it_is_for(tmp_path):
    (tmp_path / "config.yaml").write_text("task: {plugin: task/train_vae}\n")
    with pytest.raises(StorageError, match=f"first stage alone; use vae.weights={tmp_path}"):
        init_from(system(), tmp_path)


def test_a_model_of_another_size_is_refused_with_both_shapes(trained, tmp_path):
    other = system("backbone.mlp_ratio=2")
    before = weights(other)
    with pytest.raises(StorageError, match=r"shape \(\d\):.*mlp\S* is 32\S* and 16\S* here"):
        init_from(other, save(trained, tmp_path / "run"))
    assert same(weights(other), before)


def test_of_many_names_that_differ_five_are_shown(trained, tmp_path):
    other = build(compose(*(o for o in TINY if "num_blocks" not in o)))
    with pytest.raises(StorageError, match=r"missing \(39\)") as e:
        init_from(other, save(trained, tmp_path / "run"))
    assert str(e.value).count("backbone.") == 5 and "and 34 more" in str(e.value)


@pytest.mark.parametrize("kind", ["a run", "a checkpoint", "a file", "a first stage"])
def test_weights_that_do_not_fit_are_refused_before_anything_is_built(trained, tmp_path, kind):
    """No run folder, and no first stage that vae.weights=auto would fit before."""
    folder = save(trained, tmp_path / "run")
    start = {
        "a run": folder,
        "a checkpoint": checkpoint.newest(folder / "checkpoints"),
        "a file": weight_files.write(trained.trainable_state(), tmp_path / "all.safetensors"),
        "a first stage": weight_files.write(
            {"encoder.a": torch.ones(1)}, tmp_path / "vae.safetensors"
        ),
    }[kind]
    words = ["backbone.mlp_ratio=2", "vae.weights=auto", f"init_from={start}"]
    if kind == "a first stage":
        words += ["task=train_vae", "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]"]
    out = tmp_path / "out"
    root = compose(*(o for o in TINY if o[:4] != "vae."), *words, f"out={out}", f"cache={out}")
    run = {"root": to_container(root), "group": None, "overrides": []}
    with pytest.raises(StorageError, match=r"16\S* here|missing \(\d"):
        (train_vae if kind == "a first stage" else train)(run, Rank())
    assert not out.exists()


@pytest.mark.parametrize("kind", ["a run", "a checkpoint", "exported"])
def test_no_first_stage_is_trained_for_weights_that_have_one(trained, tmp_path, kind):
    """Exported ones may begin a run with a new first stage; to sample they want their own."""
    folder = save(trained, tmp_path / "run")
    (folder / "config.yaml").write_text("vae: {plugin: vae/pca, weights: auto}\n")
    start = folder if kind == "a run" else checkpoint.newest(folder / "checkpoints")
    cure = f"use vae=pca vae.weights={folder}"
    if kind == "exported":
        start, cure = tmp_path / "all.safetensors", "name its file or run with vae.weights="
        weight_files.write(trained.trainable_state(), start, trained.first_stage_hash())
    words = ("vae=kl", "vae.ch=8", "vae.embed_dim=32", f"init_from={start}")
    out = tmp_path / "out"
    wiring = wire(compose(*TINY[1:], *words, f"out={out}", f"cache={out}"))
    with pytest.raises(ConfigError, match=f"would train a first stage, but .*{cure}"):
        check_weights(wiring, is_sampled=True)
    if kind == "exported":
        return check_weights(wiring)
    with pytest.raises(ConfigError, match=cure):
        train({"root": to_container(wiring.root), "group": None, "overrides": []}, Rank())
    assert not out.exists()
    check_weights(wiring, begins=False)  # a resumed run has its first stage
    cache_path(wiring.root).parent.mkdir()
    cache_path(wiring.root).touch()
    return check_weights(wiring)  # what is there is compared when it is read


def make_foreign(kind: str, folder: Path) -> Path:
    if kind == "absent":
        return folder / "nothing"
    if kind == "no run":
        return folder
    if kind == "empty run":
        (folder / "config.yaml").write_text("seed: 1\n")
        return folder
    path = folder / ("model.safetensors" if kind == "not safetensors" else "model.ckpt")
    if kind == "foreign checkpoint":
        torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(Evil(str(folder / "ran"))))
        path.with_suffix(".json").write_text("{}")
    else:
        path.write_bytes(b"nothing of the kind")
    return path


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "no such file"),
        ("no run", "not a run folder"),
        ("empty run", "no valid checkpoint"),
        ("foreign checkpoint", r"weights do not fit this model[^$]*not in this model \(1\): a"),
        ("not safetensors", "not a readable safetensors file"),
        ("code", "not the manifest"),
    ],
)
def test_other_files_are_refused_and_not_executed(trained, tmp_path, kind, words):
    with pytest.raises(SandboxError, match=words) as e:
        init_from(trained, make_foreign(kind, tmp_path))
    assert e.value.exit_code == 5
    assert not (tmp_path / "ran").exists()


MOVING = ("backbone.width=32", "backbone.num_heads=2", "backbone.num_blocks=3")
ADDED = ("backbone.attention=spatial", "backbone.motion_module=vanilla", "backbone.skips=uvit")


def test_a_network_of_clips_begins_with_the_weights_of_one_of_pictures(tmp_path):
    pictures = system(*MOVING, seed=1)
    clips = system(*MOVING, *ADDED)
    fresh = weights(clips)
    init_from(clips, save(pictures, tmp_path / "run"))
    found = weights(clips)
    added = {k: v for k, v in fresh.items() if ".motion." in k or "skips." in k}
    assert added and same(found, weights(pictures) | added)


def test_an_addition_is_missing_completely_or_not_at_all(tmp_path):
    clips = system(*MOVING, *ADDED, seed=1)
    file = tmp_path / "weights.safetensors"
    known = {k: v.contiguous() for k, v in weights(clips).items()}
    del known["backbone.blocks.0.motion.temporal_transformer.proj_in.bias"]
    save_file(known, file)
    with pytest.raises(StorageError, match=r"1 of its weights[^$]*missing.*motion.*proj_in.bias"):
        init_from(system(*MOVING, *ADDED), file)


# --- memory ---------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Bytes of CPU storages that operations make, and how many random numbers they draw."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.random = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_plain(x)}
        out = op(*args, **(kwargs or {}))
        if ("uniform" in str(op) or "normal_" in str(op)) and is_plain(out):
            self.random += out.numel()
        for x in filter(is_plain, tree_leaves(out)):
            if x.untyped_storage()._cdata not in given:
                self.bytes += x.untyped_storage().nbytes()
        return out


def is_plain(x) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == "cpu"


LARGE = ("backbone=cogvideox", "conditioning=t5", "vae.weights=null", "logger=null",
         "backbone.num_attention_heads=8", "backbone.time_embed_dim=256")  # fmt: skip


@pytest.mark.parametrize(
    ("more", "width"), [((), 4), (("adapter=lora", "adapter.rank=1", "precision=bf16"), 2)]
)
def test_given_weights_are_made_once_in_the_dtype_of_training(tmp_path, more, width):
    """11 GB of a frozen 5b in half precision, and not first 22 GB of random numbers."""
    first = build(compose(*LARGE))
    start = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in first.backbone.state_dict().items()}, start)
    wiring = wire(compose(*LARGE, f"init_from={tmp_path}", *more))
    numbers = sum(x.numel() for x in first.backbone.state_dict().values())
    with Allocated() as made:
        system = build_system(wiring, empty=True)
        if not more:
            init_from(system, tmp_path)
    assert all(torch.equal(x, first.backbone.state_dict()[k].half().to(x.dtype))
               for k, x in system.base_state().items())  # fmt: skip
    mapped = 2  # bytes of a number in the file, which are not in memory but mapped
    assert made.bytes < (width + mapped) * numbers * 1.05, made.bytes / numbers
    assert made.random < 0.1 * numbers  # of the adapter, the conditioning and the first stage
