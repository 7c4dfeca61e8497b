"""The discrete schedule against recorded buffers of the originals, and its algebra."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plugins.schedule.ddpm import DDPM, SPACINGS, alphas_cumprod, buffers, raw_betas
from sandbox.data.randomness import Keyed, Recorded

GOLDEN = Path(__file__).parents[2] / "golden"
# The presets of conf/schedule must agree (test_presets.py).
LDM = {"betas": (0.0015, 0.0195)}
DYNAMICRAFTER = {"zero_terminal_snr": True, "prediction": "v", "base_scale": 0.7}
COGVIDEOX = {
    "2b": {"zero_terminal_snr": True, "prediction": "v", "snr_shift": 3.0},
    "5b": {"zero_terminal_snr": True, "prediction": "v", "snr_shift": 1.0},
}
PREDICTIONS = [
    {"prediction": "eps"},
    {"prediction": "v", "zero_terminal_snr": True},
    {"prediction": "v", "base_scale": 0.7},
    {"prediction": "x0", "snr_shift": 3.0},
    {"prediction": "eps", "beta_schedule": "cosine"},
]


def made(**settings) -> DDPM:
    cfg = DDPM.Config(**settings)
    assert not list(cfg.problems())
    return DDPM(cfg)


def close(name: str, got, want: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=want.dtype),
        want,
        rtol=rtol,
        atol=atol,
        msg=lambda m: f"{name}: {m}",
    )


def triple(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draws = Keyed(seed, 0, torch.arange(5), 5)
    like = torch.empty(5, 2, 3, 4, 4)
    return draws.normal("z0", like), draws.normal("eps", like), torch.tensor([0, 1, 400, 750, 998])


# what was recorded


@pytest.mark.parametrize(
    ("file", "prefix", "settings"),
    [("ldm/schedules", "buf", LDM), ("dynamicrafter/schedules", "dc", DYNAMICRAFTER)],
)
def test_published_buffers_are_reproduced(file, prefix, settings):
    tolerance = json.loads((GOLDEN / f"{file}.json").read_text())["tolerance"]
    want = {
        k.removeprefix(f"{prefix}/"): v
        for k, v in load_file(GOLDEN / f"{file}.safetensors").items()
        if k.startswith(f"{prefix}/")
    }
    got = buffers(DDPM.Config(**settings))
    assert set(got) == set(want)
    for name in want:
        close(name, got[name].astype(np.float32), want[name], **tolerance)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("linear", "scaled_linear"),
        ("sqrt_linear", "linear"),
        ("sqrt", "sqrt"),
        ("cosine", "cosine"),
    ],
)
def test_betas_match_the_published_schedule_of_another_name(published, ours):
    want = load_file(GOLDEN / "dynamicrafter/schedules.safetensors")
    noise = 1000, ours, (0.00085, 0.012), 0.008
    # float64 on both sides; the recorded cosine table was made in another order of operations
    close("betas", raw_betas(*noise), want[f"betas/{published}"], 1e-9, 1e-12)
    if published != "sqrt":  # not recorded
        got = alphas_cumprod(*noise, 1.0, True)
        close("abar", got, want[f"zsnr_alphas_cumprod/{published}"], 1e-6, 1e-12)


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_cogvideox_noise_is_reproduced(variant):
    want = {
        k.removeprefix(f"{variant}/"): v
        for k, v in load_file(GOLDEN / "cogvideox/scheduler.safetensors").items()
    }
    schedule = made(**COGVIDEOX[variant])
    abar = buffers(schedule.cfg)["alphas_cumprod"]
    close("abar", abar, want["alphas_cumprod"], 0, 1e-12)
    t = want["add_noise/t"]
    x_t = schedule.noised(want["add_noise/x0"], want["add_noise/noise"], t)
    close("x_t", x_t, want["add_noise/x_t"], 1e-5, 1e-5)
    z0 = schedule.denoised(want["x0_from_v/v"], want["add_noise/x_t"], t).z0
    close("z0", z0, want["x0_from_v/x0_pred"], 1e-5, 1e-5)


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("steps", [5, 7])
def test_cogvideox_times_are_reproduced(variant, steps):
    want = load_file(GOLDEN / "cogvideox/scheduler.safetensors")[f"{variant}/N{steps}/timesteps"]
    assert torch.equal(made(**COGVIDEOX[variant]).times(steps, "trailing"), want)


def test_spacings_are_those_recorded():
    facts = json.loads((GOLDEN / "dynamicrafter/schedules.json").read_text())
    schedule = made()
    for case, want in facts["ddim_timesteps_of_1000"].items():
        spacing, steps = case.removeprefix("uniform_").split("/")
        assert schedule.times(int(steps), spacing).tolist() == want[::-1], case


def test_ldm_noising_is_reproduced():
    want = load_file(GOLDEN / "ldm/loss.safetensors")
    z, noise = (want[k][:, :, None] for k in ("out/z", "in/noise"))
    got = made(**LDM).noised(z, noise, want["in/t"])[:, :, 0]
    close("x_noisy", got, want["out/x_noisy"], 1e-5, 1e-6)


def test_ldm_posterior_is_reproduced():
    want = load_file(GOLDEN / "ldm/loss.safetensors")
    tables = {k: torch.from_numpy(v).float() for k, v in buffers(DDPM.Config(**LDM)).items()}
    t = want["in/t"]
    first, second = (tables[f"posterior_mean_coef{i}"][t].view(-1, 1, 1, 1) for i in (1, 2))
    mean = first * want["out/z"] + second * want["out/x_noisy"]
    close("mean", mean, want["out/q_posterior_mean"], 1e-5, 1e-6)
    log_variance = tables["posterior_log_variance_clipped"][t]
    close("log variance", log_variance, want["out/q_posterior_logvar_clipped"], 1e-5, 1e-6)


def test_dynamicrafter_noising_and_target_are_reproduced():
    """The recorded step rescales z0 first; here alpha and the target include this."""
    want = load_file(GOLDEN / "dynamicrafter/conditioning_and_loss.safetensors")
    schedule = made(**DYNAMICRAFTER)
    z, eps, t = want["out/z"], want["in/noise"], want["in/t"]
    close("x_noisy", schedule.noised(z, eps, t), want["out/x_noisy"], 1e-5, 1e-5)
    close("v", schedule.target(z, eps, t), want["out/v_target"], 1e-5, 1e-5)


# algebra


@pytest.mark.parametrize("settings", PREDICTIONS)
def test_the_exact_target_recovers_z0_and_eps(settings):
    schedule = made(**settings)
    z0, eps, t = (x.double() if x.is_floating_point() else x for x in triple())
    d = schedule.denoised(schedule.target(z0, eps, t), schedule.noised(z0, eps, t), t)
    # float32 tables: where alpha or sigma is small, their rounding is divided by it
    schedule_atol = 2e-5 / min(schedule.alpha(t).min().item(), schedule.sigma(t).min().item())
    close("z0", d.z0, z0, 0, min(schedule_atol, 2e-2))
    close("eps", d.eps, eps, 0, min(schedule_atol, 2e-2))


def test_zero_snr_schedule_ends_in_pure_noise():
    schedule = made(zero_terminal_snr=True, prediction="v")
    last = torch.tensor([999])
    assert schedule.alpha(last).item() == 0
    assert schedule.sigma(last).item() == 1
    assert schedule.cfg.ends_in_noise()


def test_snr_excludes_the_rescaling_of_z0():
    t = torch.tensor([0, 300, 999])
    plain, scaled = made(prediction="v"), made(prediction="v", base_scale=0.5)
    assert torch.equal(plain.snr(t), scaled.snr(t))
    close("snr", plain.snr(t), (plain.alpha(t) / plain.sigma(t)) ** 2, 1e-5, 0)


def test_snr_shift_divides_the_snr():
    t = torch.tensor([0, 300, 999])
    close("snr", 3 * made(snr_shift=3.0).snr(t), made().snr(t), 1e-5, 0)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weights_of_all_predictions_are_equal_in_terms_of_x0(prediction):
    """The weight of the squared x0 error is min(snr, gamma), whatever is predicted."""
    schedule = made(prediction=prediction, min_snr_gamma=5.0)
    z0, eps, t = (x.double() if x.is_floating_point() else x for x in triple())
    z_t, out = schedule.noised(z0, eps, t), schedule.target(z0, eps, t) + 1e-2
    mistake = (schedule.denoised(out, z_t, t).z0 - z0).square().flatten(1).mean(1)
    snr = schedule.snr(t).flatten()
    want = snr.clamp_max(5.0) * mistake / 1e-4
    close("weight", schedule.weight(t), want.float(), 2e-2, 0)


def test_weights_are_ones_without_min_snr():
    assert torch.equal(made().weight(torch.tensor([0, 999])), torch.ones(2))


def test_elbo_weight_is_half_the_relative_snr_change_of_a_step():
    """LDM's lvlb_weights are Kingma et al. 2021, eq. 13, in signal-to-noise ratios."""
    schedule = made(**LDM)
    t = torch.tensor([1, 500, 999])
    want = (schedule.snr(t - 1) / schedule.snr(t) - 1) / 2
    close("elbo", schedule.elbo_weight(t), want.flatten(), 1e-3, 0)  # differences of float32 ratios


def test_learned_variance_lies_between_the_bounds_of_a_step():
    schedule = made(learned_variance=True)
    assert schedule.cfg.outputs() == 2
    t, z = torch.tensor([1, 999]), torch.zeros(2, 3, 1, 2, 2)
    low, high = (
        schedule.denoised(torch.cat([z, z + frac], 1), z, t).log_variance for frac in (-1, 1)
    )
    tables = buffers(schedule.cfg)
    for i, time in enumerate(t):
        close(
            "low", low[i].exp(), torch.full_like(z[i], tables["posterior_variance"][time]), 1e-4, 0
        )
        close("high", high[i].exp(), torch.full_like(z[i], tables["betas"][time]), 1e-4, 0)


def test_learned_variance_at_time_0_is_finite():
    schedule = made(learned_variance=True)
    z = torch.zeros(1, 2, 1, 2, 2)
    d = schedule.denoised(torch.cat([z, z], 1), z, torch.tensor([0]))
    assert d.log_variance.isfinite().all()


# times


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_decrease_and_stay_in_range_for_any_number_of_steps(spacing):
    schedule = made(timesteps=97)
    for steps in range(1, 98):
        times = schedule.times(steps, spacing)
        assert times.diff().lt(0).all() and times.min() >= 0 and times.max() < 97, steps
        if spacing in ("trailing", "linspace", "leading"):
            assert len(times) == steps
        if spacing in ("trailing", "linspace"):
            assert times[0] == 96


def test_uniform_has_more_times_if_steps_do_not_divide_the_schedule():
    assert made().times(7, "uniform").tolist() == [995, 853, 711, 569, 427, 285, 143, 1]


def test_independent_times_are_the_recorded_integers():
    t = torch.tensor([3, 999])
    assert torch.equal(made().draw_t(Recorded({"t": t})), t)


def test_stratified_times_fall_in_every_tenth_of_the_schedule():
    t = made(t_draw="stratified").draw_t(Keyed(0, 0, torch.arange(10), 10))
    assert sorted((t // 100).tolist()) == list(range(10))
    assert t.dtype == torch.int64


# dtypes and devices


def test_bf16_latents_stay_bf16_and_are_computed_in_float32():
    schedule = made(prediction="v")
    z0, eps, t = triple()
    low = schedule.noised(z0.bfloat16(), eps.bfloat16(), t)
    assert low.dtype == torch.bfloat16
    want = schedule.noised(z0.bfloat16().float(), eps.bfloat16().float(), t)
    assert torch.equal(low, want.bfloat16())
    assert schedule.denoised(low, low, t).z0.dtype == torch.float32


def test_a_schedule_first_used_in_inference_mode_can_train():
    schedule = made(prediction="v", min_snr_gamma=5.0)
    z0, eps, t = triple()
    with torch.inference_mode():
        schedule.denoised(z0, eps, t)
    out = torch.zeros_like(z0, requires_grad=True)
    z = schedule.denoised(out, z0, t).z0
    (schedule.weight(t) * z.square().flatten(1).mean(1)).sum().backward()
    assert out.grad.isfinite().all()


def test_a_schedule_built_on_the_meta_device_has_its_tables():
    with torch.device("meta"):
        schedule = made()
    assert schedule.alpha(torch.tensor([0])).item() == pytest.approx(0.99915**0.5, abs=1e-5)
    assert schedule.alpha(torch.zeros(2, dtype=torch.int64, device="meta")).device.type == "meta"


# settings


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"timesteps": 1}, "timesteps"),
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"betas": (0.1,)}, "betas"),
        ({"betas": (0.02, 0.0001)}, "betas"),
        ({"betas": (float("nan"), 0.02)}, "betas"),
        ({"betas": (0.5, 0.9)}, "betas"),
        ({"cosine_s": 0.0}, "cosine_s"),
        ({"snr_shift": -1.0}, "snr_shift"),
        ({"prediction": "vv"}, "prediction"),
        ({"prediction": "eps", "zero_terminal_snr": True}, "prediction"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma"),
        ({"base_scale": 1.5}, "base_scale"),
        ({"turning_step": 0}, "turning_step"),
        ({"t_draw": "random"}, "t_draw"),
        ({"v_posterior": 1.5}, "v_posterior"),
        ({"v_posterior": float("nan")}, "v_posterior"),
        ({"v_posterior": 0.5, "learned_variance": True}, "v_posterior"),
    ],
)
def test_a_bad_setting_is_named(settings, field):
    problems = list(DDPM.Config(**settings).problems())
    assert len(problems) == 1 and problems[0].startswith(field), problems


def test_all_bad_settings_are_named_at_once():
    cfg = DDPM.Config(timesteps=0, prediction="vv", base_scale=float("nan"))
    assert [p.split("=")[0] for p in cfg.problems()] == ["timesteps", "prediction", "base_scale"]


def test_a_spacing_must_start_at_pure_noise():
    plain, zero = DDPM.Config(), DDPM.Config(zero_terminal_snr=True, prediction="v")
    assert not list(plain.spacing_problems(50, "uniform"))
    (problem,) = zero.spacing_problems(50, "uniform")
    assert problem.startswith("spacing='uniform'") and "trailing" in problem


@pytest.mark.parametrize(("steps", "first"), [(1, 0), (600, 599)])
def test_leading_is_refused_if_it_starts_far_from_noise(steps, first):
    """Sampling always starts from pure noise at the first time."""
    cfg = DDPM.Config()
    assert DDPM(cfg).times(steps, "leading")[0] == first
    (problem,) = cfg.spacing_problems(steps, "leading")
    assert f"the first time is {first} of 1000" in problem and "trailing" in problem
    assert not any(
        list(cfg.spacing_problems(n, "leading")) for n in (4, 20, 30, 50, 150, 250, 1000)
    )


def test_more_steps_than_times_are_refused():
    (problem,) = DDPM.Config(timesteps=10).spacing_problems(11, "trailing")
    assert problem.startswith("steps=11")
    with pytest.raises(ValueError, match="steps=11"):
        made(timesteps=10).times(11, "trailing")
    with pytest.raises(ValueError, match="spacing='karras'"):
        made().times(10, "karras")
