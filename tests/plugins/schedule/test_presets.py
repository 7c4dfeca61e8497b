"""Presets of schedules, samplers and guidance have published numbers and are compatible."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sandbox import registry
from sandbox.contracts import PluginConfig

ROOT = Path(__file__).parents[3]
PRESETS = {
    "schedule/ddpm_ldm_celebahq": {"prediction": "eps", "betas": (0.0015, 0.0195)},
    "schedule/ddpm_cosine": {"beta_schedule": "cosine", "zero_terminal_snr": False},
    "schedule/ddpm_stable_diffusion": {"prediction": "eps", "betas": (0.00085, 0.012)},
    "schedule/ddpm_stable_diffusion_v": {
        "prediction": "v",
        "betas": (0.00085, 0.012),
        "t_draw": "stratified",
    },
    "schedule/ddpm_dynamicrafter_512": {
        "prediction": "v",
        "betas": (0.00085, 0.012),
        "zero_terminal_snr": True,
        "base_scale": 0.7,
        "turning_step": 400,
    },
    "schedule/ddpm_dynamicrafter_1024": {"prediction": "v", "base_scale": 0.3},
    "schedule/ddpm_cogvideox_2b": {
        "prediction": "v",
        "betas": (0.00085, 0.012),
        "zero_terminal_snr": True,
        "snr_shift": 3.0,
    },
    "schedule/ddpm_cogvideox_5b": {"prediction": "v", "zero_terminal_snr": True, "snr_shift": 1.0},
    "schedule/ddpm_cosine_v": {"beta_schedule": "cosine", "min_snr_gamma": 5.0},
    "schedule/ddpm_easyanimate": {
        "prediction": "eps",
        "beta_schedule": "linear",
        "betas": (0.0001, 0.02),
        "learned_variance": True,
    },
    "schedule/flow_uniform": {"t_distribution": "uniform"},
    "sampler/ddim_ldm": {"steps": 200, "eta": 0.0, "spacing": "uniform", "end": "first"},
    "sampler/ddim_dynamicrafter": {"steps": 50, "eta": 1.0, "spacing": "trailing", "end": "first"},
    "sampler/ddim_cogvideox": {"steps": 50, "eta": 0.0, "landing": "stride"},
    "guidance/cfg_dynamicrafter": {"guidance_scale": 7.5, "guidance_rescale": 0.7},
    "guidance/cfg_cogvideox": {"guidance_scale": 6.0, "guidance_rescale": 0.0},
    "guidance/cfg_easyanimate": {"guidance_scale": 6.0, "guidance_rescale": 0.0},
}


def preset(name: str) -> PluginConfig:
    registry.discover(ROOT / "plugins", "plugins")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose(name)
    return registry.typed(OmegaConf.to_container(node[name.split("/")[0]]))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_numbers(name):
    cfg = preset(name)
    assert not list(cfg.problems())
    assert {field: getattr(cfg, field) for field in PRESETS[name]} == PRESETS[name]


def test_every_preset_is_checked():
    groups = ("schedule", "sampler", "guidance", "loss")
    found = {f"{g}/{p.stem}" for g in groups for p in (ROOT / "conf" / g).glob("*.yaml")}
    ours = {n for n in found if n.split("/")[1].startswith(("ddpm_", "flow_", "ddim_", "cfg_"))}
    published = {n for n in ours if not n.endswith("_tiny")}  # tiny recipes are not published
    assert published == set(PRESETS)


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [
        ("ddim_ldm", "ddpm_ldm_celebahq"),
        ("ddim_dynamicrafter", "ddpm_dynamicrafter_512"),
        ("ddim_cogvideox", "ddpm_cogvideox_2b"),
    ],
)
def test_a_published_sampler_accepts_its_schedule(sampler, schedule):
    assert not list(preset(f"sampler/{sampler}").accepts(preset(f"schedule/{schedule}")))
