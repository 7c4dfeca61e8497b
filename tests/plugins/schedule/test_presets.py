"""Recipes and presets of schedules, samplers and guidance have the published numbers, and fit."""

import pytest

from sandbox.config import CONF
from tests.helpers import preset, recipe

PUBLISHED = {
    "ldm_celebahq_vq4": {
        "schedule": {"prediction": "eps", "betas": (0.0015, 0.0195)},
        "sampler": {"steps": 200, "eta": 0.0, "spacing": "uniform", "end": "first"},
    },
    "effects/prediction": {
        "schedule": {"beta_schedule": "cosine", "zero_terminal_snr": False},
    },
    "effects/zero_terminal_snr": {
        "schedule": {"prediction": "v", "betas": (0.00085, 0.012), "t_draw": "stratified"},
    },
    "dynamicrafter_512": {
        "schedule": {
            "prediction": "v",
            "betas": (0.00085, 0.012),
            "zero_terminal_snr": True,
            "base_scale": 0.7,
            "turning_step": 400,
        },
        "sampler": {"steps": 50, "eta": 1.0, "spacing": "trailing", "end": "first"},
        "guidance": {"guidance_scale": 7.5, "guidance_rescale": 0.7},
    },
    "dynamicrafter_1024": {"schedule": {"prediction": "v", "base_scale": 0.3}},
    "cogvideox_2b_sft": {
        "schedule": {
            "prediction": "v",
            "betas": (0.00085, 0.012),
            "zero_terminal_snr": True,
            "snr_shift": 3.0,
        },
        "sampler": {"steps": 50, "eta": 0.0, "landing": "stride"},
        "guidance": {"guidance_scale": 6.0, "guidance_rescale": 0.0},
    },
    "cogvideox_5b_sft": {
        "schedule": {"prediction": "v", "zero_terminal_snr": True, "snr_shift": 1.0},
    },
    "easyanimate_v2_stage1": {
        "schedule": {
            "prediction": "eps",
            "beta_schedule": "linear",
            "betas": (0.0001, 0.02),
            "learned_variance": True,
        },
        "guidance": {"guidance_scale": 6.0, "guidance_rescale": 0.0},
    },
}
PRESETS = {
    "schedule/ddpm_stable_diffusion": {"prediction": "eps", "betas": (0.00085, 0.012)},
    "schedule/ddpm_cosine_v": {"beta_schedule": "cosine", "min_snr_gamma": 5.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name):
    root = recipe(name)
    for group, numbers in PUBLISHED[name].items():
        cfg = getattr(root, group)
        assert not list(cfg.problems())
        assert {field: getattr(cfg, field) for field in numbers} == numbers


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_numbers(name):
    cfg = preset(*name.split("/"))
    assert not list(cfg.problems())
    assert {field: getattr(cfg, field) for field in PRESETS[name]} == PRESETS[name]


def test_every_preset_of_a_schedule_is_checked():
    assert {f"schedule/{p.stem}" for p in CONF.glob("schedule/*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", ["ldm_celebahq_vq4", "dynamicrafter_512", "cogvideox_2b_sft"])
def test_a_published_sampler_fits_its_schedule(name):
    root = recipe(name)
    assert not list(root.sampler.accepts(root.schedule))
