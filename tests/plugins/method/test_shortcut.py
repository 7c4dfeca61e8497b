"""Shortcut models: steps of several sizes, consistent with their halves."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from plugins._blocks.average_velocity import average_velocity
from sandbox import build, compose
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, Output
from sandbox.model.networks import MicroBatch, Networks
from sandbox.training.loop import fit
from tests.helpers import composed, sampled, train
from tests.inputs import batch, draws
from tests.training_sessions import differing, record, session, small, train_until

SMALL = ("backbone.width=32", "backbone.num_blocks=2", "vae.weights=null", "vae.fit_clips=16",
         "data.clips_per_epoch=16", "data.batch_size=4", "steps=2", "logger=null")  # fmt: skip
SHORTCUT = ("method=shortcut", "sampler=flow_map")


def system(*words: str):
    """A system whose output layer is not zero, and a batch of four clips."""
    wiring = wire(composed(*SMALL, *words))
    built, clips = build(wiring.root).train(), batch(wiring, 4)
    for p in built.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return built, clips


class AsStudent(Networks):
    """The student in every role."""

    def __call__(self, *args: Any, role: str = "", **rest: Any) -> Output:
        return super().__call__(*args, **rest)


def test_larger_steps_are_on_the_grid_of_sampling():
    built, _ = system(*SHORTCUT, "method.bootstrap=0.5", "method.finest=8")
    chosen, t, h = built.method.times(Networks(built), draws(400))
    assert chosen.sum() == 200  # stratified
    assert not h[~chosen].any()
    sizes = h[chosen] / 0.999
    assert sorted(set(sizes.tolist())) == pytest.approx([1 / 4, 1 / 2, 1])
    places = t[chosen] / h[chosen]  # multiples of the size, and no step ends below 0
    torch.testing.assert_close(places, places.round())
    assert (places >= 1).all() and t[chosen].max() == pytest.approx(0.999)


def test_the_target_is_the_mean_of_two_half_steps():
    """Algorithm 1; the halves of the smallest steps are along the velocity, with size 0."""
    words = (*SHORTCUT, "method.bootstrap=1", "method.finest=4")
    built, clips = system(*words)
    model, keyed = Networks(built), built.draws(clips)
    example = MicroBatch(built, clips, keyed)
    z0, cond = example.z0, example.conditions()
    chosen, t, h = built.method.times(model, keyed)
    assert chosen.all() and set((h / 0.999).tolist()) == {1.0, 0.5}
    eps = keyed.normal("noise", z0)
    z, half = built.schedule.noised(z0, eps, t), h / 2
    size = torch.where(h > 0.9, half, 0)
    first = average_velocity(model, z, t, size, cond)
    second = average_velocity(model, z - half.view(-1, 1, 1, 1, 1) * first, t - half, size, cond)
    out = average_velocity(model, z, t, h, cond)
    want = (out - (first + second) / 2).square().flatten(1).mean(1)
    terms = built.step(clips, keyed)
    torch.testing.assert_close(terms.per_sample, want)


def test_no_gradient_flows_through_the_target():
    built, clips = system(*SHORTCUT, "method.bootstrap=1")
    calls = []
    built.backbone.register_forward_hook(lambda m, args, out: calls.append(out.requires_grad))
    built.step(clips, built.draws(clips)).total.backward()
    assert calls == [True, False, False]


def test_without_larger_steps_it_is_the_loss_of_the_flow_bit_for_bit():
    terms = {}
    for words in ((), (*SHORTCUT, "method.bootstrap=0", "backbone.time_scale=1")):
        built, clips = system(*words)
        for embed in getattr(built.backbone, "time_scalars", {}).values():
            torch.nn.init.zeros_(embed.mlp[2].weight)
            torch.nn.init.zeros_(embed.mlp[2].bias)
        terms[words] = built.step(clips, built.draws(clips)).per_sample
    assert torch.equal(*terms.values())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_trains_and_samples_in_a_few_steps(steps, tmp_path):
    run = train(wire(composed(*SMALL, *SHORTCUT, f"sampler.steps={steps}")), tmp_path)
    assert len(run.losses) == 2
    assert sampled(run.system).isfinite().all()


def test_targets_of_the_ema_are_those_of_its_weights(tmp_path):
    root = small(*SHORTCUT, "sampler.steps=1", "method.targets=ema", "lr=0.05", "ema.decay=0.5",
                 "steps=4")  # fmt: skip
    with session(root, tmp_path) as training:
        fit(training)
        built = training.system.eval()
        built.method.cfg = replace(built.method.cfg, bootstrap=1.0)
        clips = batch(built.wiring, 2)
        got = built.step(clips, built.draws(clips)).per_sample
        model, keyed = Networks(built), built.draws(clips)
        example = MicroBatch(built, clips, keyed)
        z0 = example.z0
        _, t, h = built.method.times(model, keyed)
        z = built.schedule.noised(z0, keyed.normal("noise", z0), t)
        out = average_velocity(model, z, t, h, example.conditions())
        live = built.method.two_halves(AsStudent(built), z, t, h, example.conditions())
        with torch.no_grad(), training.ema_weights():
            cond = MicroBatch(built, clips, keyed).conditions()
            averaged = built.method.two_halves(AsStudent(built), z, t, h, cond)
        torch.testing.assert_close(got, (out - averaged).square().flatten(1).mean(1))
        assert not torch.allclose(live, averaged)


@pytest.mark.parametrize("targets", ["student", "ema"])
def test_a_resumed_run_is_bitwise_equal(targets, tmp_path):
    root = small(*SHORTCUT, "sampler.steps=1", "steps=4", "checkpoint.every=2",
                 f"method.targets={targets}")  # fmt: skip
    whole = record(root, tmp_path / "a").states
    train_until(2, root, tmp_path / "b")
    assert not differing(train_until(None, root, tmp_path / "b"), whole[4])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["sampler=flow_map", "sampler.steps=3"], r"sampler\.steps=3: want one of \[1, 2, 4"),
        (["sampler=flow_map", "sampler.steps=128"], r"sampler\.steps=128: .*or sampler=euler"),
        (["method.finest=100"], r"method\.finest=100: want a power of two"),
        (["method.bootstrap=2"], r"method\.bootstrap=2"),
        (["method.targets=teacher"], r"method\.targets='teacher': want one of"),
        (["method.targets=ema", "ema=none"], "method=shortcut uses the EMA"),
        (["schedule.shift=3"], r"method=shortcut: .*schedule\.shift=3.*: use 1"),
        (["schedule=ddpm"], "method=shortcut: .*use schedule=flow"),
        (["backbone=unet3d"], "tells the network step_size.*use backbone=dit"),
    ],
)
def test_what_does_not_fit_is_refused(words, match):
    with pytest.raises(ConfigError, match=match):
        compose("method=shortcut", *words)
