"""Rectified flow: interpolation, times and draws."""

import math

import pytest
import torch

from plugins.schedule.flow import Flow
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Clip
from sandbox.data.loader import batches
from sandbox.data.randomness import Keyed
from sandbox.training.build import build_system
from tests.training_sessions import small


def made(**settings) -> Flow:
    cfg = Flow.Config(**settings)
    assert not list(cfg.problems())
    return Flow(cfg)


def test_the_exact_velocity_recovers_z0_and_eps():
    flow, draws = made(), Keyed(0, 0, torch.arange(4), 4)
    z0, eps = (draws.normal(n, torch.empty(4, 2, 3, 4, 4)) for n in ("z0", "eps"))
    t = torch.tensor([0.0, 0.3, 0.999, 1.0])
    d = flow.denoised(flow.target(z0, eps, t), flow.noised(z0, eps, t), t)
    torch.testing.assert_close(d.z0, z0, rtol=0, atol=1e-6)
    torch.testing.assert_close(d.eps, eps, rtol=0, atol=1e-6)


def test_the_ends_are_data_and_noise():
    flow, z0, eps = made(), torch.ones(2, 1, 1, 1, 1), -torch.ones(2, 1, 1, 1, 1)
    assert flow.noised(z0, eps, torch.tensor([0.0, 1.0])).flatten().tolist() == [1, -1]


def test_velocity_is_the_derivative_along_the_line():
    flow, z0, eps = made(), torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    t, step = torch.tensor([0.4]), 0.125  # a power of two, so that only rounding differs
    slope = (flow.noised(z0, eps, t + step) - flow.noised(z0, eps, t)) / step
    torch.testing.assert_close(slope, flow.target(z0, eps, t), rtol=0, atol=1e-5)


def test_default_times_are_logit_normal_with_mean_and_std_1():
    n = 4096
    t = made().draw_t(Keyed(0, 0, torch.arange(n), n))
    logit = t.double().logit()
    # stratified over 4096; independent draws would have an error of 0.016
    assert logit.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert logit.std().item() == pytest.approx(1.0, abs=5e-3)


def test_uniform_times_are_stratified():
    t = made(t_distribution="uniform").draw_t(Keyed(1, 0, torch.arange(16), 16))
    assert sorted((t * 16).long().tolist()) == list(range(16))


def test_times_do_not_depend_on_how_the_batch_is_divided():
    flow, positions = made(), torch.arange(8)
    whole = flow.draw_t(Keyed(0, 0, positions, 8))
    halves = [flow.draw_t(Keyed(0, 0, part, 8)) for part in positions.chunk(2)]
    assert torch.equal(whole, torch.cat(halves))


def test_the_lowest_quantile_gives_a_finite_time():
    class Zeros(Keyed):
        def stratified(self, name):
            return torch.zeros(1)

    t = made(mean=-10.0, std=10.0).draw_t(Zeros(0, 0, torch.arange(1), 1))
    assert 0 <= t.item() < 1


def test_backbone_times_are_below_1000():
    z, t = torch.zeros(3, 1, 1, 1, 1), torch.tensor([0.0, 0.25, 1.0])
    seen = made().inputs(z, t)[1]
    assert seen[:2].tolist() == [0, 250] and seen[2] < 1000
    assert seen.dtype == torch.float32


def test_sampling_times_are_evenly_spaced_from_t_start():
    times = made().times(4, "trailing")
    assert times.tolist() == pytest.approx([0.999, 0.74925, 0.4995, 0.24975])


def test_shift_multiplies_the_odds_of_t():
    plain, shifted = (
        made().times(7, "trailing").double(),
        made(shift=3.0).times(7, "trailing").double(),
    )
    torch.testing.assert_close(shifted / (1 - shifted), 3 * plain / (1 - plain), rtol=1e-3, atol=0)


def test_shift_applies_to_training_times():
    draws = Keyed(0, 0, torch.arange(64), 64)
    logits = [made(shift=s).draw_t(draws).double().logit() for s in (1.0, 2.0)]
    torch.testing.assert_close(
        logits[1] - logits[0], torch.full((64,), math.log(2)).double(), rtol=0, atol=1e-3
    )


def test_bf16_latents_stay_bf16():
    z = torch.ones(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    assert made().noised(z, z, torch.tensor([0.5])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"t_distribution": "normal"}, "t_distribution"),
        ({"mean": float("nan")}, "mean"),
        ({"std": 0.0}, "std"),
        ({"t_draw": "sobol"}, "t_draw"),
        ({"shift": 0.0}, "shift"),
        ({"t_start": 1.5}, "t_start"),
    ],
)
def test_a_bad_setting_is_named(settings, field):
    (problem,) = Flow.Config(**settings).problems()
    assert problem.startswith(f"{field}=")


def test_other_spacings_are_refused():
    (problem,) = Flow.Config().spacing_problems(20, "uniform")
    assert problem.startswith("spacing='uniform'")
    with pytest.raises(ValueError, match="spacing='uniform'"):
        made().times(20, "uniform")


# --- a shift from the size of the latents ---------------------------------------------------------


def positions(n: int) -> Clip:
    return Clip(4, 1, n // 32, 32)


@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 9000])
def test_the_linear_rule_equals_the_dynamic_shift_of_diffusers(tokens):
    """Of Flux, whose tokens are patches of 2 x 2 latent positions."""
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    judge = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True
    )
    steps = 10
    even = [1 - i / steps for i in range(steps)]
    judge.set_timesteps(sigmas=even, mu=flux.calculate_shift(tokens))
    flow = made(size_shift="linear", t_start=1.0).for_size(positions(4 * tokens))
    torch.testing.assert_close(flow.times(steps, "trailing"), judge.sigmas[:-1])


def test_the_square_root_rule_multiplies_the_noise_level_by_that_of_the_sizes():
    """Esser et al., eq. 23: alpha = 2 for four times as many positions."""
    flow = made(size_shift="sqrt", base_positions=1024, shift=3.0, t_start=1.0)
    times = [flow.for_size(positions(n)).times(8, "trailing").double() for n in (1024, 4096)]
    torch.testing.assert_close(times[0], made(shift=3.0, t_start=1.0).times(8, "trailing").double())
    base, large = (t[1:] / (1 - t[1:]) for t in times)  # the first is pure noise
    torch.testing.assert_close(large, 2 * base, rtol=1e-4, atol=0)
    video = flow.for_size(Clip(4, 4, 32, 32)).times(8, "trailing").double()
    assert torch.equal(video, times[1])


def test_training_times_are_those_of_the_shifted_schedule():
    draws = Keyed(0, 0, torch.arange(64), 64)
    flow = made(size_shift="sqrt", base_positions=1024)
    found = flow.for_size(positions(9 * 1024)).draw_t(draws)
    assert torch.equal(found, made(shift=3.0).draw_t(draws))


def test_without_a_rule_the_size_changes_nothing():
    flow = made()
    assert flow.for_size(positions(4096)) is flow
    assert not flow.cfg.depends_on_size()


def test_training_and_sampling_use_the_schedule_for_the_size_of_their_latents():
    """Both see it through the times that the backbone gets."""
    wiring = wire(small("schedule.size_shift=sqrt", "schedule.base_positions=1", "guidance=none"))
    system = build_system(wiring).eval()
    seen: list[torch.Tensor] = []
    system.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    batch = next(batches(registry.create(wiring.root.data).split("val"), 2, 0))
    draws, grid = system.draws(batch), wiring.grids[0]
    expected = Flow(wiring.root.schedule).for_size(grid)
    assert expected.cfg.shift == pytest.approx((grid.frames * grid.height * grid.width) ** 0.5)
    system.step(batch, draws)
    assert torch.equal(seen[0], (expected.draw_t(draws) * 1000).clamp_max(999.9999))
    seen.clear()
    system.sample(batch, steps=2)
    times = expected.times(2, "trailing") * 1000
    torch.testing.assert_close(torch.stack([t[0] for t in seen]), times, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size_shift": "log"}, "size_shift"),
        ({"size_shift": "linear", "max_positions": 1024}, "max_positions"),
        ({"size_shift": "sqrt", "base_positions": 0}, "base_positions"),
        ({"log_shifts": (0.5,)}, "log_shifts has 1 entries: want 2, one for each size"),
    ],
)
def test_wrong_rules_are_named(settings, named):
    (problem,) = Flow.Config(**settings).problems()
    assert problem.partition("=")[0] == named
