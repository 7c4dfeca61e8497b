"""conditioning=classes: labels, dropping, prompts, backbones and training."""

from dataclasses import replace

import pytest
import torch

from plugins.conditioning.classes import Classes
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Batch, Clip, ConfigError, DataError
from sandbox.data.loader import batches
from sandbox.distributed.rank import Rank
from sandbox.evaluation.prompts import data_batch, user_batch
from sandbox.pipelines.encode import encode_all
from sandbox.training.build import build_system
from tests.helpers import TINY, composed, plugin_configs, with_part
from tests.inputs import draws, video
from tests.training_sessions import record

GRID = Clip(4, 3, 4, 4)
BASE = [o for o in TINY if not o.startswith("conditioning")]
CLASSES = ("conditioning=classes", "conditioning.width=8")


def module(**settings) -> Classes:
    torch.manual_seed(0)
    return Classes(Classes.Config(num_classes=10, width=8, **settings))


def vector(conditioner: Classes, labels: list[float], drop: dict | None = None, **fields):
    count = len(labels)
    batch = Batch(scalars={"label": torch.tensor(labels)}, ids=[""] * count, **fields)
    return conditioner(batch, GRID, drop or {}, draws(count), None, None).vector


def test_equal_labels_have_equal_vectors_and_dropped_ones_that_of_no_class():
    conditioner = module()
    found = vector(conditioner, [3, 3, 4])
    assert found.shape == (3, 8)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    dropped = vector(conditioner, [3, 3, 4], {"label": torch.tensor([True, False, True])})
    none = vector(conditioner, [10])[0]
    assert torch.equal(dropped[0], none) and torch.equal(dropped[2], none)
    assert torch.equal(dropped[1], found[1])


def test_labels_are_dropped_with_their_probability():
    count = 4000
    dropped = module(drop_label=0.2).drop(draws(count))["label"]
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert not module(drop_label=0).drop(draws(count))["label"].any()


def test_a_batch_without_labels_and_negative_prompts_are_errors():
    with pytest.raises(ValueError, match="needs labels"):
        module()(Batch(ids=["a"]), GRID, {}, draws(1), None, None)
    with pytest.raises(ValueError, match="no negative prompts"):
        vector(module(), [1], negative=["red"])


def test_wiring_takes_the_number_of_classes_from_the_data():
    root = wire(composed(*BASE, *CLASSES)).root
    assert root.conditioning.num_classes == 10
    assert root.backbone.vector_dim == 8
    with pytest.raises(ConfigError, match=r"conditioning.num_classes=3.*10 is needed.*moving_dig"):
        wire(composed(*BASE, *CLASSES, "conditioning.num_classes=3"))
    with pytest.raises(ConfigError, match="conditioning=classes needs label"):
        wire(composed("vae.weights=null", *CLASSES, "data=video_folder", "data.root=x"))


@pytest.mark.parametrize("conditioning", ["none", "classes"])
@pytest.mark.parametrize("key", [k for k, _ in plugin_configs("backbone")])
def test_backbones_are_unconditional_or_class_conditional(key, conditioning):
    cfg = dict(plugin_configs("backbone"))[key]
    root = with_part(composed(*TINY), "backbone", cfg)
    root = with_part(root, "conditioning", registry.default("conditioning", conditioning))
    if key in ("backbone/unet2d", "backbone/easyanimate"):
        root = replace(root, data=replace(root.data, frames=1))
    try:
        system = build_system(wire(root))
    except ConfigError as e:  # a network that always has text
        assert "context" in str(e) and "vector" not in str(e).partition("offers")[0]
        pytest.skip(f"{key} needs a context")
    clip = root.data.clips()[0]
    for p in system.backbone.parameters():  # networks begin with zeros
        torch.nn.init.normal_(p, std=0.2)
    label = {"label": torch.tensor([2.0, 7.0, 7.0])}
    pixels = video(clip, 1).expand(3, -1, -1, -1, -1)
    batch = Batch(
        pixels, scalars=label, ids=list("abc"), position=torch.zeros(3, dtype=torch.int64)
    )
    batch.captions = [""] * 3
    noise = draws(1)
    z = system.latents(batch, system.draws(batch))
    cond = system.conditioner(batch, Clip(*z.shape[1:]), {}, noise, None, z)
    t = torch.full((3,), 500) if system.root.schedule.kind == "discrete" else torch.full((3,), 0.5)
    with torch.no_grad():
        a, b, c = system.backbone(*system.schedule.inputs(z, t), cond)
    assert torch.allclose(b, c, atol=1e-5)
    assert torch.allclose(a, b, atol=1e-5) == (conditioning == "none")


def test_prompts_are_numbers_names_or_empty():
    root = wire(composed(*BASE, *CLASSES)).root
    batch = user_batch(root, ["7", "a red 3 moving left", ""])
    assert batch.scalars["label"].tolist() == [7, 3, 10]
    assert batch.captions == ["7", "a red 3 moving left", ""]
    of_data = data_batch(root, (), 5)
    assert [c.split()[2] for c in of_data.captions] == [
        f"{label:g}" for label in of_data.scalars["label"]
    ]
    message = "names no class of data=moving_digits; want a number below 10"
    for wrong in ("12", "a red moving left", "2 or 3"):
        with pytest.raises(ConfigError, match=message):
            user_batch(root, [wrong])


def test_a_run_trains_and_guided_samples_depend_on_the_class(tmp_path):
    root = wire(composed(*BASE, *CLASSES, "guidance=cfg", "steps=3")).root
    assert "conditioner.table.weight" in record(root, tmp_path).states[3]["weights"]
    system = build_system(wire(root)).eval()
    for layer in (system.backbone.patch_out, system.backbone.modulation):  # they begin with zeros
        torch.nn.init.normal_(layer.weight)
    batch = user_batch(root, ["3", "5"])
    batch.position = torch.zeros(2, dtype=torch.int64)  # the same noise
    first, second = system.sample(batch, steps=2)
    assert not torch.allclose(first, second)


def test_cached_latents_keep_the_classes(tmp_path):
    root = composed(*BASE, *CLASSES)
    cached = registry.default("data", "latents")
    data = replace(root.data, clips_per_epoch=8, num_workers=0)
    folder = stored_of(replace(root, data=data), tmp_path)
    own = replace(cached, root=folder, num_classes=10, batch_size=4)
    own = replace(own, **{n: getattr(root.data, n) for n in ("frames", "height", "width")})
    assert wire(replace(root, data=own)).root.conditioning.num_classes == 10
    source = registry.create(own)
    (batch, *_) = batches(source.split("train"), 8)
    digits = [float(c.split()[2]) for c in batch.captions]
    assert batch.scalars["label"].tolist() == digits
    assert source.label(batch.captions[0]) == digits[0] and source.label("x") is None
    with pytest.raises(DataError, match=r"data.num_classes=1: .* has class .*want the number"):
        registry.create(replace(own, num_classes=1)).split("train")


def stored_of(root, folder) -> str:
    to = str(folder / "latents")
    task = replace(registry.default("task", "encode"), to=to)
    encode_all(replace(root, task=task, cache=str(folder / "cache")), Rank())
    return to
