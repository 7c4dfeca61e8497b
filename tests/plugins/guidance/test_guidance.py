"""Guidance passes and their combination."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plugins._blocks.diffusion import rescale_std
from plugins.guidance.cfg import ClassifierFree
from plugins.guidance.cogvideox_dynamic import CogVideoXDynamic
from plugins.guidance.none import NoGuidance
from plugins.schedule.flow import Flow
from sandbox.contracts import FULL, Pass

GOLDEN = Path(__file__).parents[2] / "golden/dynamicrafter/ddim"
T = torch.tensor([5, 5])


def made(**settings) -> ClassifierFree:
    cfg = ClassifierFree.Config(**settings)
    assert not list(cfg.problems())
    return ClassifierFree(cfg)


def outs(n: int) -> list[torch.Tensor]:
    return list(torch.randn(n, 2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def test_guidance_has_a_full_and_an_unconditional_pass():
    both = Pass(frozenset({"text", "image"}))
    assert made().passes(("text", "image")) == (FULL, both)
    assert made().cfg.passes(("text", "image")) == (FULL, both)


def test_scale_1_uses_one_pass():
    assert made(guidance_scale=1.0).passes(("text",)) == (FULL,)


def test_without_signals_there_is_one_pass():
    guidance = made(guidance_scale=7.5, guidance_rescale=0.7)
    assert guidance.passes(()) == (FULL,)
    (out,) = outs(1)
    assert torch.equal(guidance.combine([out], T, 0, 1), out)


def test_guidance_extrapolates_from_the_unconditional_pass():
    full, uncond = outs(2)
    got = made(guidance_scale=3.0).combine([full, uncond], T, 0, 1)
    torch.testing.assert_close(got, uncond + 3 * (full - uncond))


def test_scale_0_is_the_unconditional_pass():
    full, uncond = outs(2)
    torch.testing.assert_close(made(guidance_scale=0.0).combine([full, uncond], T, 0, 1), uncond)


def test_recorded_rescaling_is_reproduced():
    tensors = load_file(GOLDEN.with_suffix(".safetensors"))
    tolerance = json.loads(GOLDEN.with_suffix(".json").read_text())["tolerance"]
    got = rescale_std(tensors["in/rescale/cfg"], tensors["in/rescale/text"], 0.7)
    torch.testing.assert_close(got, tensors["out/rescale"], **tolerance)


def test_full_rescaling_restores_the_deviation_of_every_sample():
    full, uncond = outs(2)
    got = made(guidance_scale=6.0, guidance_rescale=1.0).combine([full, uncond], T, 0, 1)
    axes = (1, 2, 3, 4)
    torch.testing.assert_close(got.std(axes), full.std(axes))


def test_no_guidance_returns_its_only_pass():
    guidance = NoGuidance(NoGuidance.Config())
    (out,) = outs(1)
    assert guidance.passes(("text",)) == (FULL,)
    assert guidance.combine([out], T, 0, 1) is out


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_rescale": 1.1}, "guidance_rescale"),
    ],
)
def test_a_bad_setting_is_named(settings, field):
    (problem,) = ClassifierFree.Config(**settings).problems()
    assert problem.startswith(f"{field}=")


@pytest.mark.parametrize(("steps", "t"), [(50, 999), (50, 19), (7, 142), (50, 0)])
def test_dynamic_guidance_follows_the_published_formula(steps, t):
    guidance = CogVideoXDynamic(CogVideoXDynamic.Config(guidance_scale=6.0))
    want = 1 + 6.0 * ((1 - math.cos(math.pi * ((steps - t) / steps) ** 5.0)) / 2)
    full, uncond = outs(2)
    got = guidance.combine([full, uncond], torch.tensor([t, t]), 0, steps)
    torch.testing.assert_close(got, uncond + want * (full - uncond))


def test_dynamic_guidance_of_scale_0_uses_one_pass():
    assert CogVideoXDynamic.Config(guidance_scale=0.0).passes(("text",)) == (FULL,)


def test_dynamic_guidance_refuses_continuous_times():
    assert list(CogVideoXDynamic.Config().accepts(Flow.Config()))
