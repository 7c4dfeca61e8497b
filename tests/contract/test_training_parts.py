"""Every data source, optimizer, lr_schedule, EMA, logger, callback, metric and task."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sandbox.config import registry
from sandbox.config.wiring import Wiring
from sandbox.contracts import Clip, PairedMetric, PluginConfig
from sandbox.evaluation.evaluate import first_clips
from sandbox.storage.first_stage_files import data_identity
from tests.helpers import plugin_configs, train, wired_around
from tests.inputs import draws, items_of, sizes, video

CONFIGS = dict(plugin_configs())


def each(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("key", [k for k in CONFIGS if k.rpartition("/")[0] == group])


@cache
def wiring(key: str) -> Wiring:
    return wired_around(key.partition("/")[0], CONFIGS[key])


def built(key: str) -> Any:
    return registry.create(CONFIGS[key])


# --- data -----------------------------------------------------------------------------------------


def small(key: str) -> PluginConfig:
    """A data Config with short epochs."""
    short = {"clips_per_epoch": 16} if hasattr(CONFIGS[key], "clips_per_epoch") else {}
    return replace(CONFIGS[key], batch_size=2, **short)


@each("data")
@pytest.mark.parametrize("split", ["train", "val"])
def test_clips_have_a_size_of_the_config_and_its_fields(key, split, tmp_path):
    cfg = small(key)
    _, items = items_of(cfg, split, tmp_path)
    sample = items.load(0, np.random.default_rng(0))
    if "video" in cfg.provides():
        assert sample["video"].dtype == torch.float32
        assert Clip(*sample["video"].shape) in cfg.clips()
        assert sample["video"].abs().max() <= 1
    assert ("stored" in sample) == ("stored" in cfg.provides())
    assert isinstance(sample.get("caption"), str) == ("captions" in cfg.provides())
    numbers = {"fps", "frame_stride"} & cfg.provides()
    assert all(isinstance(sample[name], float | int) for name in numbers)


@each("data")
def test_the_splits_share_no_clip(key, tmp_path):
    names = []
    for split in ("train", "val"):
        _, items = items_of(small(key), split, tmp_path)
        assert len(items) > 0
        names.append({items.id(i) for i in range(len(items))})
        assert len(names[-1]) == len(items)
    assert not names[0] & names[1]


@each("data")
def test_a_clip_depends_only_on_its_key(key, tmp_path):
    _, items = items_of(small(key), "train", tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one, other = (items.load(1, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(content(one), content(other))
    assert one.get("caption") == other.get("caption")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@each("data")
def test_validation_clips_are_always_the_same(key, tmp_path):
    _, items = items_of(small(key), "val", tmp_path)
    one, other = (items.load(0, np.random.default_rng(seed)) for seed in (1, 2))
    assert torch.equal(content(one), content(other))


def content(sample: dict[str, Any]) -> torch.Tensor:
    """The pixels of a clip, or its cached latents."""
    return sample["video"] if "video" in sample else sample["stored"]


@each("data")
def test_there_are_prompts_if_the_config_provides_them(key, tmp_path):
    cfg = small(key)
    source, _ = items_of(cfg, "train", tmp_path)
    assert bool(source.prompts()) == ("prompts" in cfg.provides())
    assert source.prompts() == source.prompts()


@each("data")
def test_unknown_splits_are_refused(key, tmp_path):
    source, _ = items_of(small(key), "train", tmp_path)
    with pytest.raises(ValueError, match="test"):
        source.split("test")


@each("data")
def test_loading_settings_are_not_part_of_the_data_identity(key):
    cfg = CONFIGS[key]
    assert data_identity(cfg) == data_identity(replace(cfg, batch_size=3, num_workers=1))


# --- optimizers and learning rates ----------------------------------------------------------------


def network() -> nn.Module:
    """A wired backbone, since optimizers select layers by name."""
    torch.manual_seed(0)
    module = registry.create(wiring("task/train").root.backbone)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    module.patch_in.bias.requires_grad_(False)
    return module


def stepped(key: str, lr: float, steps: int = 1, factor: float = 1.0) -> tuple[nn.Module, Any]:
    """A network after steps on the sum of its squared weights."""
    module = network()
    optimizer = built(key).build(list(module.named_parameters()), lr)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([p.square().sum() for p in module.parameters()]).sum().backward()
        optimizer.step()
    return module, optimizer


def size(module: nn.Module) -> float:
    return torch.stack([p.detach().square().sum() for p in module.parameters()]).sum().item()


@each("optimizer")
def test_every_trainable_parameter_is_in_one_group(key):
    module = network()
    optimizer = built(key).build(list(module.named_parameters()), 1e-3)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)


@each("optimizer")
def test_steps_lower_the_loss(key):
    assert size(stepped(key, lr=1e-3, steps=5)[0]) < size(network())


@each("optimizer")
def test_a_learning_rate_of_zero_changes_nothing(key):
    module, _ = stepped(key, lr=1e-3, factor=0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), network().parameters(), strict=True)
    )


@each("optimizer")
def test_the_peak_learning_rate_scales_every_group(key):
    rates = [[g["lr"] for g in stepped(key, lr)[1].param_groups] for lr in (1e-3, 2e-3)]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])


@each("optimizer")
def test_a_restored_optimizer_continues_exactly(key):
    full, _ = stepped(key, 1e-3, steps=4)
    half, before = stepped(key, 1e-3, steps=2)
    after = built(key).build(list(half.named_parameters()), 1e-3)
    after.load_state_dict(before.state_dict())
    for _ in range(2):
        after.zero_grad()
        torch.stack([p.square().sum() for p in half.parameters()]).sum().backward()
        after.step()
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), half.parameters(), strict=True))


@each("lr_schedule")
def test_factors_are_finite_with_a_peak_near_1(key):
    factors = [CONFIGS[key].factor(step, 1000) for step in range(1000)]
    assert all(0 <= f <= 1.001 for f in factors)
    assert max(factors) > 0.5


@each("lr_schedule")
def test_a_run_of_one_step_has_a_factor(key):
    assert 0 <= CONFIGS[key].factor(0, 1) <= 1.001


@each("ema")
def test_decays_are_in_0_to_1_and_the_interval_is_known(key):
    rule = built(key)
    assert rule.every in ("step", "micro_batch")
    if rule.decay is not None:
        for decay in (rule.decay, *getattr(rule, "others", {}).values()):
            assert all(0 <= decay(n) <= 1 for n in (1, 2, 10, 1000, 10**6))
            assert decay(1) < 1, "the EMA would never change"


@each("checkpoint")
def test_checkpoints_become_due(key):
    policy = built(key)
    assert any(policy.due(step) for step in range(1, 20_001))
    assert {"keep", "milestones", "attempts", "wait"} <= {f.name for f in fields(policy.cfg)}


# --- loggers and callbacks ------------------------------------------------------------------------


@each("logger")
def test_a_logger_accepts_everything_that_a_run_logs(key, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # no network, and no second process
    image = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    logger = built(key)
    logger.start(tmp_path, {"lr": 0.1, "data": {"plugin": "data/x"}}, "run-1", None)
    logger.metrics(1, {"loss": 0.5})
    logger.metrics(2, {"loss": 0.25, "lr": 0.1})
    logger.images(2, "samples", [image])
    logger.summary({"score": 1.0})
    logger.finish(0)


@each("callbacks")
def test_a_run_with_it_equals_one_without(key, tmp_path):
    cfg = CONFIGS[key]
    often = {f.name: 1 for f in fields(cfg) if f.name in ("every", "count", "clips")}
    plain = wiring("task/train")
    watched = replace(plain, root=replace(plain.root, callbacks={"it": replace(cfg, **often)}))
    one, other = (
        train(plain, tmp_path / "plain").system,
        train(watched, tmp_path / "watched").system,
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- metrics, reconstruction, tasks ---------------------------------------------------------------


@each("metric")
def test_a_metric_scores_clips_and_describes_its_scores(key, tmp_path):
    w, metric = wiring(key), built(key)
    many = {"clips_per_epoch": 256} if hasattr(w.root.data, "clips_per_epoch") else {}
    data = replace(w.root.data, **many)
    real, held = (
        first_clips(items_of(data, split, tmp_path)[1], count, 0)
        for split, count in (("train", 256), ("val", 32))
    )
    metric.fit(real.video, real.captions or [""] * real.size)
    captions = held.captions or [""] * held.size
    if isinstance(metric, PairedMetric):
        metric.set_references(held.video)
    scores = metric.score(held.video, captions)
    assert scores
    assert all(isinstance(v, float) for v in scores.values())
    assert set(scores) <= set(metric.meaning())
    assert metric.proportions() <= set(metric.meaning())
    assert scores == metric.score(held.video, captions)
    for clips in metric.baselines(captions).values():
        assert clips.shape == held.video.shape
        assert set(metric.score(clips, captions)) <= set(metric.meaning())


@each("reconstruction")
def test_a_reconstruction_loss_trains_the_first_stages_that_it_accepts(key):
    cfg = CONFIGS[key]
    accepted = [
        v for k, v in CONFIGS.items()
        if k.startswith("vae/") and v.fitted() == "trained" and not list(cfg.accepts(v))
    ]  # fmt: skip
    assert accepted
    module = registry.create(accepted[0])
    made = module.reconstruct(video(wiring(accepted[0].plugin).clips[0]), draws())
    terms = built(key)(made)
    assert terms.total.shape == ()
    assert terms.per_sample.shape == (2,)
    terms.total.backward()
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


@each("vae")
def test_a_trained_first_stage_names_a_loss_that_accepts_it(key):
    cfg = CONFIGS[key]
    assert cfg.fitted() in ("none", "closed_form", "trained")
    if cfg.fitted() == "trained":
        assert list(registry.default("reconstruction", cfg.regularizer()).accepts(cfg)) == []


@each("vae")
def test_a_first_stage_in_closed_form_can_be_fitted(key):
    if CONFIGS[key].fitted() != "closed_form":
        pytest.skip("it is not fitted in closed form")
    module, x = built(key), video(wiring(key).clips[0], 8)
    module.fit([x[:4], x[4:]])
    assert module.decode(module.scaled(module.encode(x).mean)).shape == (
        8,
        *sizes(wiring(key).clips[0]),
    )


@each("task")
def test_a_task_is_callable_and_has_default_lr_and_steps(key):
    first_stage = wiring("task/train").root.vae
    assert callable(built(key))
    assert {"lr", "steps"} <= set(CONFIGS[key].defaults(first_stage))
