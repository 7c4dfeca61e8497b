"""Every sampler on problems with known solutions: a point, a Gaussian, a nested step."""

import pytest
import torch
from torch import Tensor

from plugins.sampler.cogvideox_dpm import CogVideoXDPM
from plugins.sampler.ddim import DDIM
from plugins.sampler.ddpm import Ancestral
from plugins.sampler.dpmpp_2m import DPMpp2M
from plugins.sampler.euler import Euler
from plugins.sampler.heun import Heun
from plugins.sampler.pndm import PNDM
from plugins.schedule.ddpm import DDPM, SPACINGS
from plugins.schedule.flow import Flow
from sandbox.contracts import Denoised
from sandbox.randomness import Keyed, Recorded
from sandbox.sampling import PlainHooks

SAMPLERS = {
    "ddim": DDIM(DDIM.Config()),
    "ddim_eta1": DDIM(DDIM.Config(eta=1.0)),
    "ddpm": Ancestral(Ancestral.Config()),
    "ddpm_beta": Ancestral(Ancestral.Config(variance="beta")),
    "euler": Euler(Euler.Config()),
    "heun": Heun(Heun.Config()),
    "pndm": PNDM(PNDM.Config()),
    "dpmpp_2m": DPMpp2M(DPMpp2M.Config()),
    "cogvideox_dpm": CogVideoXDPM(CogVideoXDPM.Config()),
}
SCHEDULES = {
    "flow": Flow(Flow.Config()),
    "shifted": Flow(Flow.Config(shift=3.0, t_start=1.0)),
    "eps": DDPM(DDPM.Config()),
    "v": DDPM(DDPM.Config(prediction="v", zero_terminal_snr=True)),
    "rescaled": DDPM(DDPM.Config(prediction="v", zero_terminal_snr=True, base_scale=0.7)),
    "cosine": DDPM(DDPM.Config(prediction="x0", beta_schedule="cosine")),
}
PAIRS = [
    (sampler, schedule)
    for sampler in SAMPLERS
    for schedule in SCHEDULES
    if not list(SAMPLERS[sampler].cfg.accepts(SCHEDULES[schedule].cfg))
]


def draws(size: int) -> Keyed:
    return Keyed(0, 0, torch.arange(size), size)


def start(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return draws(shape[0]).normal("start", torch.empty(shape)).to(dtype)


def oracle(schedule, mean, std):
    """The optimal model for normal latents: posterior means of z0 and eps given z_t."""

    def model(z_t: Tensor, t: Tensor, step: int) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        z0 = mean + gain * (z_t - alpha * mean)
        return schedule.target(z0, (z_t - alpha * z0) / sigma, t)

    return model


def error_half_way(sampler, schedule, steps: int, mean: float = 0.5, std: float = 0.6) -> float:
    """Maximum error to the exact solution of the probability-flow ODE at half the time.

    Not at the end: a thousand times cannot resolve the last stretch, where sigma grows like
    the root of t, and all solvers cross it in one step of first order.
    """
    z = start(16, 1, 1, 2, 2, dtype=torch.float64)
    seen, model = {}, oracle(schedule, mean, std)

    def watched(z_t: Tensor, t: Tensor, step: int) -> Tensor:
        seen.setdefault(t[0].item(), z_t)
        return model(z_t, t, step)

    sampler(watched, schedule, z, steps, draws(16))
    times = schedule.times(steps, "trailing")
    (alpha0, alpha), (sigma0, sigma) = (
        f(times[[0, steps // 2]]).flatten().double() for f in (schedule.alpha, schedule.sigma)
    )
    spread0, spread = (alpha0 * std).hypot(sigma0), (alpha * std).hypot(sigma)
    exact = alpha * mean + (z - alpha0 * mean) * spread / spread0
    return (seen[times[steps // 2].item()] - exact).abs().max().item()


def test_every_sampler_is_paired_with_a_schedule():
    refused = {(a, b) for a in SAMPLERS for b in SCHEDULES} - set(PAIRS)
    discrete = ("cogvideox_dpm", "pndm")
    assert refused == {(sampler, flow) for sampler in discrete for flow in ("flow", "shifted")}


@pytest.mark.parametrize(("sampler", "schedule"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_data_at_one_point_is_recovered_exactly(sampler, schedule, steps):
    """CogVideoX's sampler may end between times, or before 0."""
    schedule, point = SCHEDULES[schedule], torch.linspace(-2, 2, 8).view(1, 2, 1, 2, 2)
    z = start(3, 2, 1, 2, 2)
    got = SAMPLERS[sampler](oracle(schedule, point, 0.0), schedule, z, steps, draws(3))
    # float32 rounding is divided by alpha (0.07 at the noisy end); time 0 still has sigma 0.03
    atol = 0.2 if sampler == "cogvideox_dpm" else 2e-4
    torch.testing.assert_close(got, point.expand_as(got), rtol=0, atol=atol)


@pytest.mark.parametrize("schedule", ["flow", "eps", "v", "rescaled"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order, schedule):
    coarse, fine = (error_half_way(SAMPLERS[sampler], SCHEDULES[schedule], n) for n in (20, 40))
    # half the step divides the error by about 2^order: measured 2.0 and 3.7 to 3.9
    assert 0.85 * 2**order < coarse / fine < 1.15 * 2**order, (coarse, fine)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", [DDIM, Euler, Heun, PNDM, DPMpp2M])
def test_every_spacing_solves_the_ode_from_its_first_time(sampler, spacing):
    schedule, z = SCHEDULES["eps"], start(16, 1, 1, 2, 2, dtype=torch.float64)
    first = schedule.times(200, spacing)[:1]
    alpha, sigma = (f(first).item() for f in (schedule.alpha, schedule.sigma))
    exact = 0.5 + 0.6 * (z - alpha * 0.5) / (alpha**2 * 0.6**2 + sigma**2) ** 0.5
    cfg = sampler.Config(spacing=spacing)
    got = sampler(cfg)(oracle(schedule, 0.5, 0.6), schedule, z, 200, draws(16))
    # measured 0.024 for first order; 0.010 for second, mostly from the first-order last step
    atol = 0.03 if sampler in (DDIM, Euler) else 0.012
    torch.testing.assert_close(got, exact, rtol=0, atol=atol)


def test_heun_on_a_flow_is_second_order_up_to_the_last_step():
    """There sigma is t itself, and the first-order last step is short enough."""
    schedule, z = SCHEDULES["flow"], start(16, 1, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = 0.001, 0.999
    exact = 0.5 + 0.6 * (z - alpha * 0.5) / (alpha**2 * 0.6**2 + sigma**2) ** 0.5
    model = oracle(schedule, 0.5, 0.6)
    coarse, fine = (
        (SAMPLERS["heun"](model, schedule, z, n, draws(16)) - exact).abs().max() for n in (20, 40)
    )
    assert coarse / fine > 3.5  # measured 4.2


@pytest.mark.parametrize("schedule", ["flow", "eps", "v", "cosine"])
def test_ddim_with_eta_1_is_ancestral_sampling(schedule):
    schedule, z = SCHEDULES[schedule], start(4, 2, 1, 3, 3)
    model = oracle(schedule, 0.3, 0.8)
    got = [SAMPLERS[s](model, schedule, z, 50, draws(4)) for s in ("ddim_eta1", "ddpm")]
    # the same Gaussians by other formulas: float32 rounding over 50 steps
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_eta1", "ddpm", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", ["flow", "v", "rescaled"])
def test_samples_have_the_mean_and_deviation_of_the_data(sampler, schedule):
    schedule, z = SCHEDULES[schedule], start(64, 4, 2, 4, 4)
    got = SAMPLERS[sampler](oracle(schedule, 1.5, 0.5), schedule, z, 200, draws(64))
    # 8192 numbers: standard errors 0.006 and 0.004; ancestral sampling in 200 steps is 0.017 narrow
    assert got.mean().item() == pytest.approx(1.5, abs=0.03)
    assert got.std().item() == pytest.approx(0.5, abs=0.03)


def test_flow_euler_moves_by_the_velocity():
    schedule, z = SCHEDULES["flow"], start(2, 1, 1, 2, 2)
    velocity = torch.full_like(z, 0.25)
    got = SAMPLERS["euler"](lambda z, t, step: velocity, schedule, z, 20, draws(2))
    torch.testing.assert_close(got, z - 0.999 * velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(s, list(range(4))) for s in SAMPLERS if s != "heun"] + [("heun", [0, 0, 1, 1, 2, 2, 3])],
)
def test_model_calls_are_numbered_by_step_in_order(sampler, calls):
    schedule, seen = SCHEDULES["v"], []

    def model(z: Tensor, t: Tensor, step: int) -> Tensor:
        seen.append((step, t.tolist()))
        return torch.zeros_like(z)

    SAMPLERS[sampler](model, schedule, start(2, 1, 1, 2, 2), 4, draws(2))
    assert [step for step, _ in seen] == calls
    times = [t for _, t in seen]
    assert times[0] == [999, 999] and times == sorted(times, reverse=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_hooks_see_every_call_and_can_change_both_estimates(sampler):
    schedule = SCHEDULES["v"]

    class Pin(PlainHooks):
        def __init__(self) -> None:
            self.befores, self.denoiseds = [], []

        def before(self, z_t: Tensor, t: Tensor) -> Tensor:
            self.befores.append(t[0].item())
            return z_t

        def denoised(self, d: Denoised, t: Tensor) -> Denoised:
            self.denoiseds.append(t[0].item())
            return Denoised(torch.ones_like(d.z0), torch.zeros_like(d.eps), d.log_variance)

    hooks = Pin()
    z = start(2, 1, 1, 2, 2)
    got = SAMPLERS[sampler](lambda z, t, step: z, schedule, z, 4, draws(2), hooks)
    assert hooks.befores == hooks.denoiseds and len(hooks.befores) >= 4
    torch.testing.assert_close(got, torch.ones_like(got), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bf16_latents_stay_bf16_for_the_model_and_the_result(sampler):
    schedule, seen = SCHEDULES["v"], set()

    def model(z: Tensor, t: Tensor, step: int) -> Tensor:
        seen.add(z.dtype)
        return torch.zeros_like(z)

    z = start(2, 1, 1, 2, 2, dtype=torch.bfloat16)
    got = SAMPLERS[sampler](model, schedule, z, 4, draws(2))
    assert got.dtype == torch.bfloat16 and seen == {torch.bfloat16} and got.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_independent_of_the_batch(sampler):
    schedule, z = SCHEDULES["v"], start(4, 1, 1, 2, 2)
    model = oracle(schedule, 0.0, 1.0)
    whole = SAMPLERS[sampler](model, schedule, z, 4, draws(4))
    half = SAMPLERS[sampler](model, schedule, z[2:], 4, Keyed(0, 0, torch.arange(2, 4), 4))
    assert torch.equal(whole[2:], half)


def test_learned_variance_scales_ancestral_noise():
    schedule = DDPM(DDPM.Config(timesteps=4, betas=(0.1, 0.5), learned_variance=True))
    sampler = Ancestral(Ancestral.Config(steps=4, variance="learned"))
    assert not list(sampler.cfg.accepts(schedule.cfg))
    z = start(2, 1, 1, 2, 2)
    posterior = Ancestral(Ancestral.Config(variance="posterior"))
    low = sampler(lambda z, t, s: torch.cat([z, -torch.ones_like(z)], 1), schedule, z, 4, draws(2))
    want = posterior(lambda z, t, s: torch.cat([z, z], 1), schedule, z, 4, draws(2))
    torch.testing.assert_close(low, want, rtol=0, atol=1e-5)  # -1 is the lower bound, the posterior


@pytest.mark.parametrize(
    ("cfg", "field"),
    [
        (DDIM.Config(steps=0), "steps"),
        (DDIM.Config(eta=1.5), "eta"),
        (DDIM.Config(eta=float("nan")), "eta"),
        (DDIM.Config(temperature=-1.0), "temperature"),
        (DDIM.Config(end="last"), "end"),
        (DDIM.Config(landing="far"), "landing"),
        (DDIM.Config(landing="stride", spacing="uniform"), "landing"),
        (DDIM.Config(landing="stride", end="first"), "end"),
        (Ancestral.Config(variance="large"), "variance"),
    ],
)
def test_a_bad_setting_is_named(cfg, field):
    (problem,) = cfg.problems()
    assert problem.startswith(f"{field}=")


@pytest.mark.parametrize(
    ("cfg", "schedule", "field"),
    [
        (DDIM.Config(spacing="uniform"), "v", "spacing="),
        (DDIM.Config(spacing="karras"), "eps", "spacing="),
        (Euler.Config(spacing="leading"), "flow", "spacing="),
        (Heun.Config(steps=2000), "eps", "steps="),
        (DPMpp2M.Config(spacing="quad"), "v", "spacing="),
        (DDIM.Config(end="first"), "flow", "end="),
        (DDIM.Config(landing="stride"), "flow", "landing="),
        (Ancestral.Config(variance="learned"), "eps", "variance="),
        (CogVideoXDPM.Config(), "flow", "cogvideox_dpm: "),
    ],
)
def test_an_incompatible_schedule_is_refused(cfg, schedule, field):
    (problem,) = cfg.accepts(SCHEDULES[schedule].cfg)
    assert problem.startswith(field) and "want" in problem


@pytest.mark.parametrize(("share", "fixed"), [(-1.0, "posterior"), (1.0, "beta")])
@pytest.mark.parametrize("steps", [7, 20])
def test_a_learned_variance_with_a_subset_of_times_uses_the_longer_steps(share, fixed, steps):
    schedule = DDPM(DDPM.Config(learned_variance=True))
    learned = Ancestral(Ancestral.Config(variance="learned", steps=steps))
    assert not list(learned.cfg.accepts(schedule.cfg))
    z = start(2, 1, 1, 2, 2)

    def model(z: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.cat([0.5 * z, torch.full_like(z, share)], 1)

    want = Ancestral(Ancestral.Config(variance=fixed))(model, schedule, z, steps, draws(2))
    torch.testing.assert_close(learned(model, schedule, z, steps, draws(2)), want)


@pytest.mark.parametrize("steps", [4, 10, 25])
def test_pndm_equals_diffusers(steps):
    reference = pytest.importorskip("diffusers").PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing="leading",
    )  # fmt: skip
    reference.set_timesteps(steps)
    schedule, z = SCHEDULES["eps"], start(2, 2, 1, 3, 3)
    model = oracle(schedule, 0.5, 0.6)
    want = z
    for t in reference.timesteps:
        want = reference.step(model(want, t.expand(2), 0), t, want, return_dict=False)[0]
    got = PNDM(PNDM.Config(spacing="leading"))(model, schedule, z, steps, draws(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # its tables are float32


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_with_eta_1_equals_euler_ancestral_of_diffusers(spacing):
    """It works on z / alpha, with noise level sigma / alpha."""
    reference = pytest.importorskip("diffusers").EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing=spacing,
    )  # fmt: skip
    reference.set_timesteps(10)
    schedule, z = SCHEDULES["eps"], start(2, 2, 1, 3, 3)
    times = schedule.times(10, spacing)
    assert times.tolist() == reference.timesteps.tolist()
    model, level = oracle(schedule, 0.5, 0.6), float(schedule.alpha(times[:1]))
    want, generator = z / level, torch.Generator().manual_seed(0)
    for t in reference.timesteps:
        out = model(reference.scale_model_input(want, t), t.long().expand(2), 0)
        want = reference.step(out, t, want, generator=generator, return_dict=False)[0]
    generator.manual_seed(0)
    noise = {f"sampler_noise_{i}": torch.randn(z.shape, generator=generator) for i in range(10)}
    euler_a = DDIM(DDIM.Config(eta=1.0, spacing=spacing))
    got = euler_a(model, schedule, z, 10, Recorded(noise))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # its tables are float32
