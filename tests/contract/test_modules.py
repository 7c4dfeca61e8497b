"""Every network (first stage, backbone, ...): devices, state, determinism, gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sandbox.config import registry
from sandbox.config.wiring import Wiring
from sandbox.contracts import Conditions, PluginConfig, PluginError
from sandbox.model.latent_diffusion import clip_of
from tests.helpers import plugin_configs, wired_around
from tests.inputs import batch, conditions, draws, leave_nan_behind, sizes, tensor, video

CONFIGS = dict(plugin_configs("vae", "backbone", "conditioning", "loss"))


@cache
def wiring(key: str) -> Wiring:
    return wired_around(key.partition("/")[0], CONFIGS[key])


def complete(key: str) -> PluginConfig:
    """The Config completed by the wiring."""
    return getattr(wiring(key).root, key.partition("/")[0])


def built(key: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return registry.create(complete(key))


def is_module(key: str) -> bool:
    try:
        return issubclass(registry.plugin_class(key), nn.Module)
    except PluginError:
        return True  # it cannot be imported: all its tests fail


# --- outputs by kind ----------------------------------------------------------------------


def first_stage(module: nn.Module, w: Wiring) -> dict[str, Tensor]:
    made = module.reconstruct(video(w.clips[0]), draws())
    terms = [(made.video - made.target).square().mean(), 1e-3 * made.posterior.kl().mean()]
    if made.codebook_loss is not None:
        terms.append(made.codebook_loss.mean())
    return {"video": made.video, "loss": torch.stack(terms).sum()}


def backbone(module: nn.Module, w: Wiring) -> dict[str, Tensor]:
    z = tensor(2, *sizes(w.grids[0]))
    out = module(z, torch.tensor([0.0, 999.5]), conditions(w.slots[0], w.grids[0]))
    return {"out": out, "loss": (out - z.mean()).square().mean()}


def conditions_of(module: nn.Module, w: Wiring) -> Conditions:
    """Conditions of a batch of two; the second sample drops all signals."""
    signals = w.root.conditioning.signals()
    return module(
        batch(w), w.grids[0], {s: torch.tensor([False, True]) for s in signals}, draws(),
        lambda pixels, name: tensor(2, *sizes(w.latents[0])), tensor(2, *sizes(w.grids[0])),
    )  # fmt: skip


def conditioning(module: nn.Module, w: Wiring) -> dict[str, Tensor]:
    found = dict(conditions_of(module, w).tensors())
    floating = [x for x in found.values() if x.requires_grad]
    return found | (
        {"loss": torch.stack([x.square().mean() for x in floating]).sum()} if floating else {}
    )


def loss(module: nn.Module, w: Wiring) -> dict[str, Tensor]:
    schedule = registry.create(w.root.schedule)
    z0, eps = tensor(2, *sizes(w.grids[0])), tensor(2, *sizes(w.grids[0]), seed=1)
    out = tensor(2, *sizes(w.grids[0]), seed=2).requires_grad_()
    terms = module(schedule, out, z0, eps, schedule.draw_t(draws()))
    return {"loss": terms.total, "per_sample": terms.per_sample}


RUNS: dict[str, Callable[[nn.Module, Wiring], dict[str, Tensor]]] = {
    "vae": first_stage,
    "backbone": backbone,
    "conditioning": conditioning,
    "loss": loss,
}


def run(key: str, module: nn.Module) -> dict[str, Tensor]:
    return RUNS[key.partition("/")[0]](module, wiring(key))


each_module = pytest.mark.parametrize("key", [k for k in CONFIGS if is_module(k)])
each_first_stage = pytest.mark.parametrize("key", [k for k in CONFIGS if k.startswith("vae/")])
each_backbone = pytest.mark.parametrize("key", [k for k in CONFIGS if k.startswith("backbone/")])
each_conditioner = pytest.mark.parametrize(
    "key", [k for k in CONFIGS if k.startswith("conditioning/")]
)


# --- all of them ----------------------------------------------------------------------------------


@each_module
def test_the_meta_device_gives_the_same_names_and_shapes(key):
    with torch.device("meta"):
        empty = registry.create(complete(key))
    state = empty.state_dict()
    assert {t.device.type for t in state.values()} <= {"meta"}
    assert shapes(state) == shapes(built(key).state_dict())


@each_module
def test_its_state_loads_strictly(key):
    one, other = built(key, 0).eval(), built(key, 1).eval()
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    a, b = run(key, one), run(key, other)
    assert all(torch.equal(a[name], b[name]) for name in a)


@each_module
def test_the_same_seed_gives_the_same_result(key):
    a, b = run(key, built(key).eval()), run(key, built(key).eval())
    assert all(torch.equal(a[name], b[name]) for name in a)


@each_module
def test_it_leaves_the_global_generator_alone(key):
    module = built(key).eval()
    before = torch.get_rng_state()
    run(key, module)
    assert torch.equal(torch.get_rng_state(), before)


@each_module
def test_every_parameter_gets_a_finite_gradient(key):
    module = built(key)
    found = run(key, module)
    if "loss" in found and found["loss"].requires_grad:
        found["loss"].backward()
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, "processes that train together wait for these for ever"
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@each_module
def test_bfloat16_runs_forward_and_backward(key):
    module = built(key)
    with torch.autocast("cpu", torch.bfloat16):
        leave_nan_behind()
        found = run(key, module)
    assert all(x.isfinite().all() for x in found.values())
    if "loss" in found and found["loss"].requires_grad:
        leave_nan_behind()
        found["loss"].float().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items()}


# --- backbones -----------------------------------------------------------------------------------


@each_backbone
@torch.no_grad()
def test_a_time_for_each_frame_is_taken_or_refused_by_the_config(key):
    """Equal times of all frames are one time; another time of the last frame changes its output."""
    w, module = wiring(key), perturbed(built(key)).double().eval()
    if not complete(key).takes_frame_times():
        pytest.skip("takes one time for a clip")
    z, cond = tensor(2, *sizes(w.grids[0])).double(), conditions(w.slots[0], w.grids[0])
    cond = Conditions(**{
        f: as_double(getattr(cond, f)) for f in Conditions.__dataclass_fields__
    })  # fmt: skip
    t = torch.tensor([20.0, 700.0], dtype=torch.float64)
    one, each = module(z, t, cond), module(z, t[:, None].expand(-1, z.shape[2]), cond)
    torch.testing.assert_close(one, each, rtol=1e-10, atol=1e-10)
    other = t[:, None].repeat(1, z.shape[2])
    other[:, -1] += 150
    assert (module(z, other, cond) - one)[:, :, -1].abs().max() > 1e-6


def perturbed(module: nn.Module) -> nn.Module:
    """Weights that start at zero would hide the time."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return module


def as_double(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: as_double(v) for k, v in x.items()}
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


# --- first stages ---------------------------------------------------------------------------------


@each_first_stage
@torch.no_grad()
def test_latents_have_the_size_stated_by_the_config(key):
    w, module = wiring(key), built(key).eval()
    posterior = module.encode(video(w.clips[0]))
    assert clip_of(posterior.mean) == clip_of(module.scaled(posterior.mean)) == w.latents[0]
    assert posterior.sample(torch.zeros_like(posterior.mean)).shape == posterior.mean.shape
    assert posterior.kl().shape == (2,)


@each_first_stage
@torch.no_grad()
def test_decoded_clips_have_the_original_size(key):
    w, module = wiring(key), built(key).eval()
    out = module.decode(tensor(2, *sizes(w.latents[0])))
    assert clip_of(out) == w.clips[0]


@each_first_stage
@torch.no_grad()
def test_the_cached_tensor_restores_the_posterior(key):
    module = built(key).eval()
    posterior = module.encode(video(wiring(key).clips[0]))
    again = module.posterior(posterior.stored.clone())
    noise = tensor(*posterior.mean.shape)
    assert torch.equal(posterior.sample(noise), again.sample(noise))
    assert posterior.is_random or torch.equal(posterior.sample(noise), posterior.mean)


@each_first_stage
@torch.no_grad()
def test_one_clip_does_not_change_another(key):
    module, x = built(key).eval(), video(wiring(key).clips[0])
    together, alone = module.encode(x).mean, module.encode(x[:1]).mean
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)  # order of sums


# --- backbones ------------------------------------------------------------------------------------


@each_backbone
def test_the_output_is_as_large_as_the_latents(key):
    w = wiring(key)
    out = run(key, built(key))["out"]
    grid = w.grids[0]
    assert out.shape == (2, w.root.schedule.outputs() * grid.channels, *sizes(grid)[1:])


@each_backbone
@torch.no_grad()
def test_samples_of_a_batch_are_independent(key):
    w, module = wiring(key), built(key).eval()
    for parameter in module.parameters():
        parameter.add_(0.05 * tensor(*parameter.shape))  # away from zero initialisation
    z, t = tensor(2, *sizes(w.grids[0])), torch.tensor([100.0, 900.0])
    cond = conditions(w.slots[0], w.grids[0])
    out = module(z, t, cond)
    scalars = {name: x[:1] for name, x in cond.scalars.items()}
    others = {name: x[:1] for name, x in cond.tensors() if name not in scalars}
    first = Conditions(**others, scalars=scalars)
    torch.testing.assert_close(out[:1], module(z[:1], t[:1], first), atol=1e-4, rtol=1e-4)


# --- conditioning ---------------------------------------------------------------------------------


@each_conditioner
def test_it_returns_the_slots_that_its_config_offers(key):
    w = wiring(key)
    cond, slots = conditions_of(built(key), w), w.slots[0]
    expected = conditions(slots, w.grids[0])
    assert shapes(dict(cond.tensors())) == shapes(dict(expected.tensors()))


@each_conditioner
def test_it_drops_the_signals_that_its_config_names(key):
    drop = built(key).drop(draws())
    assert set(drop) == set(complete(key).signals())
    assert all(x.shape == (2,) and x.dtype == torch.bool for x in drop.values())


@each_conditioner
def test_it_can_sample_without_clips(key):
    w = wiring(key)
    empty = batch(w)
    empty.video = None
    if w.root.conditioning.encodes():
        pytest.skip("it is conditioned on clips")
    kept = {s: torch.zeros(2, dtype=torch.bool) for s in complete(key).signals()}
    found = built(key)(empty, w.grids[0], kept, draws(), lambda pixels, name: pixels, None)
    assert set(dict(found.tensors())) == set(dict(conditions(w.slots[0], w.grids[0]).tensors()))
