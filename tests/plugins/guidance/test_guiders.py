"""Guidance plugins against the guiders of diffusers, step by step on random outputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import guiders
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from torch import Tensor

from plugins.guidance.apg import AdaptiveProjected
from plugins.guidance.autoguidance import Autoguidance
from plugins.guidance.cfg_zero_star import ZeroStar
from plugins.guidance.interval import Interval
from plugins.guidance.skip_layer import SkipLayer
from sandbox import compose
from sandbox.contracts import FULL, ConfigError, Pass

STEPS = 10
LAYER = {"skip_layer_guidance_layers": [1]}
CASES = [
    (
        Interval,
        {"guidance_scale": 5.0},
        guiders.ClassifierFreeGuidance,
        {"start": 0.2, "stop": 0.8},
    ),
    (
        Interval,
        {"guidance_scale": 5.0, "start": 0.0, "stop": 0.55, "guidance_rescale": 0.7},
        guiders.ClassifierFreeGuidance,
        {"start": 0.0, "stop": 0.55, "guidance_rescale": 0.7},
    ),
    (
        AdaptiveProjected,
        {"guidance_scale": 8.0},
        guiders.AdaptiveProjectedGuidance,
        {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5,
         "adaptive_projected_guidance_rescale": 0.0},
    ),
    (
        AdaptiveProjected,
        {"guidance_scale": 8.0, "eta": 0.5, "momentum": -0.75, "norm_threshold": 15.0,
         "guidance_rescale": 0.3},
        guiders.AdaptiveProjectedGuidance,
        {"eta": 0.5, "adaptive_projected_guidance_momentum": -0.75,
         "adaptive_projected_guidance_rescale": 15.0, "guidance_rescale": 0.3},
    ),
    (
        Autoguidance,
        {"guidance_scale": 3.0, "guidance_rescale": 0.4},
        guiders.AutoGuidance,
        {"auto_guidance_layers": [1], "dropout": 0.1, "guidance_rescale": 0.4},
    ),
    (ZeroStar, {"guidance_scale": 4.0}, guiders.ClassifierFreeZeroStarGuidance, {}),
    (
        ZeroStar,
        {"guidance_scale": 4.0, "zero_init_steps": 3},
        guiders.ClassifierFreeZeroStarGuidance,
        {"zero_init_steps": 3},
    ),
    (
        SkipLayer,
        {"guidance_scale": 4.0, "skip_scale": 2.5},
        guiders.SkipLayerGuidance,
        {"skip_layer_guidance_scale": 2.5, "skip_layer_guidance_start": 0.0,
         "skip_layer_guidance_stop": 1.0, **LAYER},
    ),
    (
        SkipLayer,
        {"guidance_scale": 1.0, "skip_scale": 2.5},
        guiders.SkipLayerGuidance,
        {"skip_layer_guidance_scale": 2.5, "skip_layer_guidance_start": 0.0,
         "skip_layer_guidance_stop": 1.0, "use_original_formulation": True, **LAYER},
    ),
]  # fmt: skip


def random_outputs(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    full, uncond, skipped = torch.randn(3, 2, 4, 3, 4, 4, generator=g)
    return {"full": full, "uncond": uncond, "skipped": skipped}


def ours(plugin: Callable[..., Any], settings: dict[str, Any]) -> list[Tensor]:
    cfg = plugin.Config(**settings)  # type: ignore[attr-defined]
    if plugin is SkipLayer:
        cfg.skip = ("blocks.1",)
    assert not list(cfg.problems())
    guidance = plugin(cfg)
    passes, results = guidance.passes(("text",)), []
    for step in range(STEPS):
        outs = random_outputs(step)
        active = cfg.active(passes, step, STEPS)
        given = [outs["skipped" if p.skip else "full" if p == FULL else "uncond"] for p in active]
        results.append(guidance.combine(given, torch.zeros(2), step, STEPS))
    return results


def theirs(guider: Any, steps: range) -> list[Tensor]:
    results = []
    for step in steps:
        guider.set_state(step, STEPS, torch.tensor(0))
        outs = random_outputs(step)
        given = {"pred_cond": outs["full"], "pred_uncond": outs["uncond"]}
        if isinstance(guider, guiders.SkipLayerGuidance):
            given["pred_cond_skip"] = outs["skipped"]
        results.append(guider.forward(**given).pred)
    return results


@pytest.mark.parametrize(("plugin", "settings", "guider", "options"), CASES)
def test_it_equals_the_guider_of_diffusers(plugin, settings, guider, options):
    if settings["guidance_scale"] == 1:
        settings_of_guider = {"guidance_scale": 0.0}  # the original formulation counts from 0
    else:
        settings_of_guider = {"guidance_scale": settings["guidance_scale"]}
    reference = guider(**settings_of_guider, **options)
    if plugin is AdaptiveProjected:  # created when a pipeline prepares the first step
        reference.momentum_buffer = MomentumBuffer(options["adaptive_projected_guidance_momentum"])
    # diffusers starts skip-layer guidance after the first step
    first = 1 if plugin is SkipLayer else 0
    got, want = ours(plugin, settings), theirs(reference, range(first, STEPS))
    for a, b in zip(got[first:], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_apg_starts_without_momentum_in_each_run():
    first = ours(AdaptiveProjected, {})
    guidance = AdaptiveProjected(AdaptiveProjected.Config())
    for _ in range(2):
        guidance.passes(("text",))
        outs = random_outputs(0)
        got = guidance.combine([outs["full"], outs["uncond"]], torch.zeros(2), 0, STEPS)
        torch.testing.assert_close(got, first[0])


def test_steps_outside_the_interval_run_one_pass():
    cfg = Interval.Config(start=0.5, stop=1.0)
    passes = cfg.passes(("text",))
    assert [len(cfg.active(passes, step, 4)) for step in range(4)] == [1, 1, 2, 2]


def test_the_skipping_pass_keeps_all_conditions():
    cfg = SkipLayer.Config(skip=("blocks.1",))
    assert cfg.passes(("text",))[-1] == Pass(skip=("blocks.1",))
    assert cfg.passes(()) == (Pass(), Pass(skip=("blocks.1",)))


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["backbone=dit"], "blocks.2"),
        (["backbone=unet3d"], "middle_block"),
        (["guidance.skip=[blocks.0]"], "blocks.0"),
    ],
)
def test_by_default_the_middle_block_is_skipped(words, want):
    assert compose("guidance=skip_layer", *words).guidance.skip == (want,)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["guidance=interval", "guidance.start=0.9"], r"guidance\.start=0\.9: want less than stop"),
        (["guidance=skip_layer", "guidance.skip=[]"], r"guidance\.skip=\[\]: want the names"),
        (["guidance=skip_layer", "guidance.skip=[blocks.9]"], r"want blocks from .* to blocks\.3"),
        (["guidance=cfg_zero_star", "schedule=ddpm"], "want schedule=flow"),
        (["guidance=apg", "guidance.eta=2"], r"guidance\.eta=2"),
    ],
)
def test_bad_settings_are_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        compose(*words)
