"""Interfaces of every schedule, loss, sampler and guidance, presets included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.wiring import Wiring
from sandbox.contracts import FULL, PluginConfig
from tests.helpers import plugin_configs, preset, presets, wired_around
from tests.inputs import draws, tensor

COUNT = 64


def options(group: str) -> Iterator[str]:
    """Plugins and presets of a group: "schedule/ddpm", "schedule/ddpm_cosine_v"."""
    yield from (key for key, _ in plugin_configs(group))
    yield from (f"{g}/{name}" for g, name, _ in presets() if g == group)


@cache
def config_of(key: str) -> PluginConfig:
    group, _, name = key.partition("/")
    plugins = dict(plugin_configs(group))
    return plugins[key] if key in plugins else preset(group, name)


@cache
def wiring(key: str) -> Wiring:
    return wired_around(key.partition("/")[0], config_of(key))


def built(key: str, group: str | None = None) -> Any:
    """The component, or a compatible one of another group."""
    return registry.create(getattr(wiring(key).root, group or key.partition("/")[0]))


each_schedule = pytest.mark.parametrize("key", [*options("schedule")])
each_loss = pytest.mark.parametrize("key", [*options("loss")])
each_sampler = pytest.mark.parametrize("key", [*options("sampler")])
each_guidance = pytest.mark.parametrize("key", [*options("guidance")])


# --- schedules ------------------------------------------------------------------------------------


@each_schedule
def test_times_are_drawn_for_each_sample_from_the_draws(key):
    schedule = built(key)
    t = schedule.draw_t(draws(COUNT))
    assert t.shape == (COUNT,)
    assert t.dtype == (torch.int64 if config_of(key).kind == "discrete" else torch.float32)
    assert torch.equal(t, schedule.draw_t(draws(COUNT)))
    assert t.min() >= 0
    assert len(t.unique()) > COUNT // 4


@each_schedule
def test_backbone_times_are_in_0_to_1000(key):
    schedule = built(key)
    t = torch.cat([schedule.draw_t(draws(COUNT)), schedule.times(3, "trailing")])
    z = tensor(len(t), 2, 1, 1, 1)
    z_in, t_in = schedule.inputs(z, t)
    assert z_in.shape == z.shape
    assert t_in.min() >= 0
    assert t_in.max() < 1000


@each_schedule
def test_noised_latents_are_alpha_z0_plus_sigma_eps(key):
    schedule, t = built(key), built(key).draw_t(draws(4))
    z0, eps = tensor(4, 3, 2, 2, 2), tensor(4, 3, 2, 2, 2, seed=1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.shape == sigma.shape == schedule.snr(t).shape == (4, 1, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(schedule.noised(z0, eps, t), alpha * z0 + sigma * eps)


@each_schedule
def test_the_exact_prediction_recovers_latents_and_noise(key):
    """At a middle time; at the ends one of the two may not be recoverable."""
    schedule = built(key)
    t = schedule.times(8, "trailing")[3:5]
    z0, eps = tensor(2, 3, 2, 2, 2), tensor(2, 3, 2, 2, 2, seed=1)
    target = schedule.target(z0, eps, t)
    out = torch.cat([target] * config_of(key).outputs(), 1)  # prediction and variance
    found = schedule.denoised(out, schedule.noised(z0, eps, t), t)
    faded = schedule.alpha(t) * found.z0 + schedule.sigma(t) * found.eps
    torch.testing.assert_close(faded, schedule.noised(z0, eps, t), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.eps, eps, atol=1e-4, rtol=1e-4)  # float32, alpha to 0.1


@each_schedule
def test_sampling_times_decrease_from_the_noisiest(key):
    schedule = built(key)
    times = schedule.times(6, "trailing")
    assert times.shape == (6,)
    assert (times.diff() < 0).all()
    noise = schedule.sigma(times) / schedule.alpha(times).clamp_min(1e-9)
    assert (noise.diff(dim=0) < 0).all()


@each_schedule
def test_ends_in_noise_matches_the_final_snr(key):
    last = built(key).times(4, "trailing")[:1]
    alpha = built(key).alpha(last).item()
    assert alpha < 0.01 if config_of(key).ends_in_noise() else alpha > 0


@each_schedule
def test_weights_are_one_finite_number_for_each_sample(key):
    schedule = built(key)
    weight = schedule.weight(schedule.draw_t(draws(COUNT)))
    assert weight.shape == (COUNT,)
    assert weight.isfinite().all()
    assert (weight >= 0).all()


@each_schedule
def test_a_time_for_each_frame_is_a_time_for_each_frame(key):
    """(B, T) times give what each frame has with its own time."""
    if not config_of(key).takes_frame_times():
        pytest.skip("takes one time for a clip")
    schedule, z0, eps = built(key), tensor(4, 3, 2, 2, 2), tensor(4, 3, 2, 2, 2, seed=1)
    t = torch.stack([schedule.draw_t(draws(4, seed)) for seed in (0, 1)], 1)
    out = torch.cat([tensor(4, 3, 2, 2, 2, seed=2)] * config_of(key).outputs(), 1)
    z_t, target, d = (
        schedule.noised(z0, eps, t), schedule.target(z0, eps, t), schedule.denoised(out, z0, t)
    )  # fmt: skip
    for i in range(2):
        f = slice(i, i + 1)
        x, e, o, at = z0[:, :, f], eps[:, :, f], out[:, :, f], t[:, i]
        assert torch.equal(z_t[:, :, f], schedule.noised(x, e, at))
        assert torch.equal(target[:, :, f], schedule.target(x, e, at))
        assert torch.equal(d.z0[:, :, f], schedule.denoised(o, x, at).z0)
        assert torch.equal(schedule.weight(t)[:, i], schedule.weight(at))
        assert torch.equal(schedule.alpha(t)[:, :, f], schedule.alpha(at))


@each_schedule
def test_unknown_spacings_are_refused_by_config_and_by_class(key):
    assert list(config_of(key).spacing_problems(4, "sideways"))
    with pytest.raises(ValueError, match="sideways"):
        built(key).times(4, "sideways")


# --- losses ---------------------------------------------------------------------------------------


def terms(key: str, error: float) -> Any:
    """The loss of outputs with a constant `error`, and the outputs."""
    schedule, loss = built(key, "schedule"), built(key)
    z0, eps = tensor(4, 3, 2, 2, 2), tensor(4, 3, 2, 2, 2, seed=1)
    t = schedule.draw_t(draws(4))
    out = (schedule.target(z0, eps, t) + error).requires_grad_()
    variance = [torch.zeros_like(out)] * (schedule.cfg.outputs() - 1)  # next to the prediction
    return loss(schedule, torch.cat([out, *variance], 1), z0, eps, t), out


@each_loss
def test_a_loss_is_one_number_with_one_for_each_sample(key):
    found, _ = terms(key, 0.5)
    assert found.total.shape == ()
    assert found.per_sample.shape == (4,)
    assert found.per_sample.isfinite().all()
    assert all(x.shape == () and not x.requires_grad for x in found.log.values())


@each_loss
def test_equal_times_of_all_frames_have_the_loss_of_one_time(key):
    if not config_of(key).takes_frame_times():
        pytest.skip("takes one time for a clip")
    schedule, loss, out = built(key, "schedule"), built(key), tensor(4, 3, 2, 2, 2, seed=2)
    z0, eps, t = tensor(4, 3, 2, 2, 2), tensor(4, 3, 2, 2, 2, seed=1), schedule.draw_t(draws(4))
    one = loss(schedule, out, z0, eps, t)
    each = loss(schedule, out, z0, eps, t[:, None].repeat(1, 2))
    torch.testing.assert_close(one.per_sample, each.per_sample)
    torch.testing.assert_close(one.total, each.total)


@each_loss
def test_a_better_output_has_a_lower_loss_and_the_gradient_points_there(key):
    found, out = terms(key, 0.5)
    better, _ = terms(key, 0.1)
    assert (better.per_sample < found.per_sample).all()
    found.total.backward()
    assert (out.grad > 0).all()  # all outputs are too large


@each_loss
def test_losses_are_computed_in_float32(key):
    schedule, loss = built(key, "schedule"), built(key)
    z0 = tensor(2, 3, 2, 2, 2).bfloat16()
    out = torch.cat([z0] * schedule.cfg.outputs(), 1)
    found = loss(schedule, out, z0, z0, schedule.draw_t(draws(2)))
    assert found.total.dtype == torch.float32


# --- samplers -------------------------------------------------------------------------------------

TRUTH = 0.3


class Oracle:
    """The optimal model for data at a single clip; records its calls."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.steps: list[int] = []

    def __call__(
        self, z_t: Tensor, t: Tensor, step: int, scalars: Any = None, past: Any = None
    ) -> Tensor:
        assert all(x.shape == (len(z_t),) for x in (scalars or {}).values())
        assert t.shape in ((len(z_t),), (len(z_t), z_t.shape[2]))
        self.steps.append(step)
        z0 = torch.full_like(z_t, TRUTH)
        eps = (z_t - self.schedule.alpha(t) * z0) / self.schedule.sigma(t)
        return self.schedule.target(z0, eps, t)


def solved(key: str, steps: int = 10, seed: int = 0, **oracle: Any) -> tuple[Tensor, Oracle]:
    model = Oracle(built(key, "schedule"))
    z = tensor(2, 3, 1, 4, 4)
    return built(key)(model, model.schedule, z, steps, draws(2, seed)), model


@each_sampler
def test_a_perfect_model_recovers_the_data(key):
    z, _ = solved(key)
    assert z.shape == (2, 3, 1, 4, 4)
    assert z.dtype == torch.float32
    assert (z - TRUTH).abs().mean() < 0.1  # some end, as published, at the first noise level


@each_sampler
def test_steps_are_counted_from_zero_in_at_most_twice_as_many_calls(key):
    _, model = solved(key)
    assert sorted(set(model.steps)) == list(range(10))
    assert model.steps == sorted(model.steps)
    assert len(model.steps) <= 20


@each_sampler
def test_all_noise_comes_from_the_draws(key):
    before = torch.get_rng_state()
    one, other = solved(key)[0], solved(key)[0]
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@each_sampler
def test_one_step_is_enough_to_run(key):
    assert solved(key, steps=1)[0].isfinite().all()


# --- guidance -------------------------------------------------------------------------------------


@each_guidance
def test_the_full_pass_comes_first_and_others_drop_known_signals(key):
    guidance = built(key)
    for signals in ((), ("text",), ("text", "image")):
        passes = guidance.passes(signals)
        assert passes == guidance.cfg.passes(signals)
        assert passes[0] == FULL
        assert all(p.dropped <= set(signals) for p in passes)
    assert not any(p.dropped for p in guidance.passes(()))


@each_guidance
def test_equal_passes_are_unchanged_or_stop_a_step(key):
    guidance, out = built(key), tensor(2, 3, 1, 4, 4)
    passes, t = guidance.passes(("text",)), torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        active = guidance.cfg.active(passes, step, 4)
        assert active[0] == FULL and set(active) <= set(passes)
        got = guidance.combine([out.clone() for _ in active], t, step, 4)
        if step or got.any():  # a first step of zero velocity
            torch.testing.assert_close(got, out)


@each_guidance
def test_a_single_pass_is_unchanged(key):
    out = tensor(2, 3, 1, 4, 4)
    assert torch.equal(built(key).combine([out], torch.zeros(2), 0, 4), out)
