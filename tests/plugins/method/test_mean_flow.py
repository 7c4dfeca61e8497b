"""MeanFlow: derivatives of the network, targets, and sampling in one step."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plugins._blocks.average_velocity import derivative
from sandbox import build, compose
from sandbox.config.wiring import wire
from sandbox.contracts import Conditions, ConfigError, Output, StorageError
from sandbox.model.networks import MicroBatch, Networks
from tests.helpers import composed, sampled, train
from tests.inputs import batch, conditions, sizes, tensor
from tests.training_sessions import differing, record, small, train_until

SMALL = ("backbone.width=32", "backbone.num_blocks=2", "vae.weights=null", "vae.fit_clips=16",
         "data.clips_per_epoch=16", "data.batch_size=4", "steps=2", "logger=null")  # fmt: skip
MEAN_FLOW = ("method=mean_flow", "sampler=flow_map")
FLOW = ("method.unequal=0", "method.adaptive_power=0", "backbone.time_scale=1")


def system(*words: str):
    """A system whose output layer is not zero, and a batch of four clips."""
    wiring = wire(composed(*SMALL, *words))
    built, clips = build(wiring.root).train(), batch(wiring, 4)
    for p in built.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return built, clips


def step(*words: str):
    built, clips = system(*words)
    terms = built.step(clips, built.draws(clips))
    terms.total.backward()
    grads = {n: p.grad for n, p in built.backbone.named_parameters() if "time_scalars" not in n}
    return terms, grads


# --- the derivative -------------------------------------------------------------------------------

NETWORKS = {
    "joint": (),
    "factorised": ("backbone.attention=factorised",),
    "spatial": ("backbone.attention=spatial", "backbone.motion_module=vanilla"),
    "skips": ("backbone.skips=uvit", "backbone.num_blocks=3"),
    "text": ("conditioning=t5", "conditioning.weights=null"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_is_that_of_finite_differences(name):
    """In float64, along the velocity, at a fixed end of the step."""
    words = (*SMALL, *MEAN_FLOW, *NETWORKS[name])
    wiring = wire(composed(*words))
    built = build(wiring.root)
    model, grid = Networks(built), wiring.grids[0]
    for p in built.backbone.double().parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    slots = replace(wiring.slots[0], time_scalars=frozenset())
    cond = conditions(slots, grid)
    cond = replace(cond, **{k: x.double() for k, x in cond.tensors() if x.is_floating_point()})
    z, v = (tensor(2, *sizes(grid), seed=i).double() for i in (0, 1))
    t, h = torch.tensor([0.7, 0.4]).double(), torch.tensor([0.5, 0.0]).double()

    def u(d: float) -> Tensor:
        with torch.no_grad():
            return model(z + d * v, t + d, cond, scalars={"step_size": h + d}).raw

    got, d = derivative(model, z, t, h, cond, v), 1e-6
    want = (u(d) - u(-d)) / (2 * d)
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())


def test_the_exact_average_velocity_satisfies_the_identity():
    """Equation 6, for latents N(0, 1/4): the flow scales them by its standard deviation."""

    def deviation(t: Tensor) -> Tensor:
        return ((1 - t).square() / 4 + t.square()).sqrt().view(-1, 1, 1, 1, 1)

    def average(z: Tensor, t: Tensor, cond: Conditions, scalars: Any, role: str = "") -> Output:
        h = scalars["step_size"]
        end = z * deviation(t - h) / deviation(t)
        return Output((z - end) / h.view(-1, 1, 1, 1, 1))

    z, cond = tensor(3, 1, 1, 2, 2).double(), Conditions()
    t, h = (torch.tensor(x).double() for x in ([0.9, 0.5, 0.3], [0.8, 0.2, 0.3]))
    w = t.view(-1, 1, 1, 1, 1)
    v = z * (w - (1 - w) / 4) / deviation(t).square()  # of the marginal flow
    du = derivative(average, z, t, h, cond, v)  # type: ignore[arg-type]
    u = average(z, t, cond, {"step_size": h}).raw
    torch.testing.assert_close(u, v - h.view(-1, 1, 1, 1, 1) * du)


def test_a_lost_derivative_is_an_error():
    built, clips = system(*MEAN_FLOW)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="derivative of the network is"):
        built.step(clips, built.draws(clips))


def test_bf16_autocast_keeps_the_derivative_and_every_gradient():
    """Within a tenth: bf16 has three digits."""
    words = (*MEAN_FLOW, "method.unequal=1", "method.adaptive_power=0")
    terms, _ = step(*words)
    built, clips = system(*words)
    with torch.autocast("cpu", torch.bfloat16):
        low = built.step(clips, built.draws(clips))
    low.total.backward()
    assert all(p.grad is not None for p in built.backbone.parameters())
    torch.testing.assert_close(low.per_sample, terms.per_sample, rtol=0.1, atol=0)


# --- targets --------------------------------------------------------------------------------------


def test_with_equal_times_it_is_the_loss_of_the_flow_bit_for_bit():
    flow, flow_grads = step()
    mean, _ = step(*MEAN_FLOW, *FLOW)
    built, clips = system(*MEAN_FLOW, *FLOW)
    torch.nn.init.zeros_(built.backbone.time_scalars["step_size"].mlp[2].weight)
    torch.nn.init.zeros_(built.backbone.time_scalars["step_size"].mlp[2].bias)
    terms = built.step(clips, built.draws(clips))
    assert torch.equal(terms.per_sample, flow.per_sample)
    assert not torch.equal(mean.per_sample, flow.per_sample)  # the step size matters
    terms.total.backward()
    for name, grad in flow_grads.items():
        assert torch.equal(built.backbone.get_parameter(name).grad, grad), name


def test_only_clips_with_unequal_times_differ_from_the_flow():
    words = (*MEAN_FLOW, "method.adaptive_power=0")
    flow, half = (step(*words, f"method.unequal={x}")[0]
                  for x in ("0", "0.5"))  # fmt: skip
    assert ((flow.per_sample - half.per_sample).abs() > 1e-6).sum() == 2


def test_the_network_starts_as_that_of_the_flow():
    """Its other weights, and so what it computes, do not depend on the method."""
    flow, mean = (build(wire(composed(*SMALL, *words)).root) for words in ((), MEAN_FLOW))
    own = dict(mean.backbone.named_parameters())
    for name, p in flow.backbone.named_parameters():
        assert torch.equal(own.pop(name), p), name
    assert {n.split(".")[0] for n in own} == {"time_scalars"}


def test_the_target_moves_against_the_derivative():
    """Equation 10, with the network's own calls."""
    built, clips = system(*MEAN_FLOW, "method.unequal=1", "method.adaptive_power=0")
    model, draws = Networks(built), built.draws(clips)
    example = MicroBatch(built, clips, draws)
    t, h = built.method.times(model, draws)
    eps, cond = draws.normal("noise", example.z0), example.conditions()
    z_t, v = built.schedule.noised(example.z0, eps, t), eps - example.z0
    assert (h > 0).all() and (h <= t).all()
    du = derivative(model, z_t, t, h, cond, v)
    u = model(z_t, t, cond, scalars={"step_size": h}).raw
    want = (u - v + h.view(-1, 1, 1, 1, 1) * du).square().flatten(1).mean(1)
    terms = built.step(clips, draws)
    torch.testing.assert_close(terms.per_sample, want)


def test_guidance_in_the_target_is_that_of_equation_19():
    words = (*MEAN_FLOW, *FLOW, "method.guidance_scale=3", "guidance=none")
    built, clips = system(*words)
    model, draws = Networks(built), built.draws(clips)
    example = MicroBatch(built, clips, draws)
    t = built.schedule.draw_t(draws)
    eps = draws.normal("noise", example.z0)
    z_t, zero = built.schedule.noised(example.z0, eps, t), {"step_size": torch.zeros(4)}
    without = example.conditions(frozenset({"text"}))
    u = model(z_t, t, example.conditions(), scalars=zero).raw
    guided = 3 * (eps - example.z0) - 2 * model(z_t, t, without, scalars=zero).raw
    want = (u - guided).square().flatten(1).mean(1)
    torch.testing.assert_close(built.step(clips, draws).per_sample, want)


def test_the_adaptive_weight_divides_by_the_error():
    plain = step(*MEAN_FLOW, "method.adaptive_power=0")[0].per_sample
    terms = step(*MEAN_FLOW, "method.adaptive_power=0.5", "method.adaptive_offset=0.1")[0]
    torch.testing.assert_close(terms.per_sample, plain / (plain + 0.1).sqrt())
    torch.testing.assert_close(terms.log["mse"], plain.mean())


def test_activation_checkpointing_changes_no_gradient():
    words = (*MEAN_FLOW, "method.unequal=1")
    (_, plain), (_, low) = step(*words), step(*words, "backbone.gradient_checkpointing=true")
    for name, grad in plain.items():
        torch.testing.assert_close(low[name], grad, rtol=1e-4, atol=1e-6)


# --- runs -----------------------------------------------------------------------------------------


def test_it_trains_and_samples_in_one_step(tmp_path):
    run = train(wire(composed(*SMALL, *MEAN_FLOW)), tmp_path)
    assert len(run.losses) == 2
    assert run.system.root.sampler.steps == 1
    assert sampled(run.system).isfinite().all()


def test_a_resumed_run_is_bitwise_equal(tmp_path):
    root = small(*MEAN_FLOW, "steps=4", "checkpoint.every=2", "guidance=none",
                 "method.guidance_scale=2")  # fmt: skip
    whole = record(root, tmp_path / "a").states
    train_until(2, root, tmp_path / "b")
    assert not differing(train_until(None, root, tmp_path / "b"), whole[4])


def test_it_starts_from_a_run_of_the_flow_as_the_same_network(tmp_path):
    """Its embedding of the step size is new and zero; an adapter would freeze it there."""
    flow = train(wire(composed(*SMALL)), tmp_path)
    words = (*SMALL, "method=mean_flow", "backbone.time_scale=1", f"init_from={flow.folder}")
    built, clips = build(wire(composed(*words)).root), batch(flow.system.wiring, 4)
    flow.system.load_trainable(
        {k: v for k, v in built.trainable_state().items() if "time_scalars" not in k}
    )
    assert torch.equal(built.eval().sample(clips), flow.system.eval().sample(clips))
    with pytest.raises(StorageError, match=r"no weights for step_size .* use adapter=null"):
        build(wire(composed(*words, "adapter=lora")).root)


def test_an_adapter_trains_on_weights_of_this_method(tmp_path):
    base = train(wire(composed(*SMALL, *MEAN_FLOW)), tmp_path / "base")
    words = (*SMALL, *MEAN_FLOW, "backbone.time_scale=0.001", "adapter=lora", "precision=bf16",
             f"init_from={base.folder}")  # fmt: skip
    built, clips = build(wire(composed(*words)).root).train(), batch(base.system.wiring, 4)
    terms = built.step(clips, built.draws(clips))
    terms.total.backward()
    assert terms.total.isfinite()
    assert {p.grad is not None for p in built.parameters() if p.requires_grad} == {True}


def test_other_samplers_use_the_velocity():
    """Euler with step size 0 in every call, which is the flow's sampler."""
    built, clips = system(*MEAN_FLOW)
    seen = []
    embed = built.backbone.time_scalars["step_size"]
    embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    euler = build(wire(composed(*SMALL, "method=mean_flow", "sampler.steps=3")).root).sampler
    built.eval().sample(clips, sampler=euler, steps=3)
    assert len(seen) == 3 and not torch.cat(seen).any()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_sampler_passes_the_size_of_each_step(steps):
    built, _ = system(*MEAN_FLOW)
    schedule, calls = built.schedule, []

    def model(z: Tensor, t: Tensor, step: int, scalars: dict[str, Tensor]) -> Tensor:
        calls.append((t[0].item(), scalars["step_size"][0].item()))
        return torch.ones_like(z)

    z = tensor(2, 1, 1, 2, 2)
    end = built.sampler(model, schedule, z, steps, SimpleNamespace())
    assert len(calls) == steps
    for (t, h), (after, _) in zip(calls, [*calls[1:], (0.0, 0.0)], strict=True):
        assert t - h == pytest.approx(after, abs=1e-6)
    torch.testing.assert_close(end, z - 0.999)  # velocity 1 from 0.999 to 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["backbone=unet3d", "method=mean_flow"], "tells the network step_size.*use backbone=dit"),
        (["schedule=ddpm", "method=mean_flow"], "method=mean_flow: .* use schedule=flow"),
        (["loss=ldm", "method=mean_flow"], "method=mean_flow: .* use loss=mse"),
        (["sampler=flow_map"], "sampler=flow_map .*use method=mean_flow or method=shortcut"),
        (["method=mean_flow", "method.unequal=2"], r"method\.unequal=2"),
        (["method=mean_flow", "method.guidance_scale=2"], "would guide twice"),
        (["method=mean_flow", "trainer=fsdp2"], "trainer=fsdp2 shards the weights"),
        (
            ["method=mean_flow", "init_from=run"],
            r"backbone\.time_scale=null: .*with init_from, want",
        ),
        (["backbone.time_scalars=[step_size]"], r"backbone\.time_scalars=\['step_size'\], but"),
    ],
)
def test_what_does_not_fit_is_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        compose(*words)
