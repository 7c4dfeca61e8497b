"""method=repa: hidden features agree with those of a frozen encoder of the clean frames."""

from dataclasses import replace

import pytest
import torch

from sandbox.cli.jobs import check_and_wire
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError
from sandbox.model.networks import MicroBatch, Networks
from sandbox.runs.run import Run
from sandbox.training.build import build_system, load_system
from sandbox.training.loop import fit
from sandbox.weights.init_from import init_from
from tests.helpers import composed, plugin_configs, sampled, wired_around, with_part
from tests.inputs import batch, with_clips
from tests.training_sessions import differing, record, session, small, train_until

WORDS = ("features=words", "features.width=8", "features.steps=4", "features.clips=16")
SETTINGS = ("method=repa", *WORDS, "steps=4", "checkpoint.every=2", "data.clips_per_epoch=8",
            "data.batch_size=4")  # fmt: skip


BACKBONES = dict(plugin_configs("backbone"))


@pytest.mark.parametrize("key", BACKBONES)
def test_hidden_features_lie_on_the_grid_of_the_latents(key, tmp_path):
    """A change of one latent cell changes the features most where it is."""
    root = wired_around("backbone", BACKBONES[key]).root
    root = replace(root, data=with_clips(root.data, tmp_path))
    root = wire(with_part(root, "method", dict(plugin_configs("method"))["method/repa"])).root
    system = build_system(wire(root), tmp_path).eval()
    clips = batch(system.wiring, 2)
    draws = system.draws(clips)
    example = MicroBatch(system, clips, draws)
    z, name = example.z0, system.method.cfg.module
    changed = z.clone()
    changed[:, :, -1, -1, 0] += 1
    t, cond = system.schedule.draw_t(draws), example.conditions(frozenset())
    with torch.no_grad():
        one, two = (Networks(system)(x, t, cond, (name,)).features[name] for x in (z, changed))
    hidden = root.backbone.hidden(name)
    grid = [n // cells for n, cells in zip(z.shape[2:], hidden.cells, strict=True)]
    assert [*one.shape] == [2, hidden.channels, *grid]
    change = (two - one)[0].square().mean(0)
    assert change.flatten().argmax() == torch.arange(change.numel()).view(*grid)[-1, -1, 0]
    assert example.features.shape[:3] == (2, 8, z.shape[2])


def test_it_adds_one_minus_the_cosine(tmp_path):
    with session(small(*SETTINGS, "method.weight=0.25"), tmp_path) as training:
        system = training.system
        clips = batch(system.wiring, 4)
        terms = system.step(clips, system.draws(clips))
        (hidden,) = captured_features(system, clips)
        features = MicroBatch(system, clips, system.draws(clips)).features
        rows = system.method.projector(hidden.movedim(1, -1)).flatten(0, 3)
        target = features.movedim(1, -1).flatten(0, 3)  # already on the grid of 4 x 4
        cosine = (rows * target).sum(1) / (rows.norm(dim=1) * target.norm(dim=1))
        assert terms.log["alignment"].item() == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
        want = terms.per_sample.mean() + 0.25 * terms.log["alignment"]
        assert terms.total.item() == pytest.approx(want.item(), rel=1e-5)


def captured_features(system, clips):
    draws = system.draws(clips)
    example = MicroBatch(system, clips, draws)
    t, eps = system.schedule.draw_t(draws), draws.normal("noise", example.z0)
    z_t = system.schedule.noised(example.z0, eps, t)
    out = Networks(system)(z_t, t, example.conditions(), (system.method.cfg.module,))
    return out.features.values()


def test_the_frames_are_those_of_the_latents(tmp_path):
    """Of 9 frames, which are 1 + 4 + 4 in the latents, it takes 0, 4 and 8."""
    with session(small(*SETTINGS), tmp_path) as training:
        system = training.system
        video = batch(system.wiring, 2).video
        want = torch.stack([system.features(video[:, :, t]) for t in (0, 4, 8)], 2)
        assert torch.equal(system.features_of(video, 3), want)


def test_the_projection_trains_and_the_encoder_does_not(tmp_path):
    states = record(small(*SETTINGS), tmp_path).states
    names = {name for name in states[1]["weights"] if name.startswith(("method.", "features."))}
    changed = {n for n in names if differing(states[1]["weights"][n], states[4]["weights"][n])}
    assert changed == {n for n in names if n.startswith("method.projector")}
    assert {n.partition(".")[0] for n in names} == {"method", "features"}
    (config,) = tmp_path.glob("*/config.yaml")
    assert "alignment" in Run(config.parent).metrics()[4]


def test_it_resumes_bit_for_bit_with_the_fitted_encoder(tmp_path):
    root = small(*SETTINGS)
    straight = train_until(None, root, tmp_path / "straight")
    train_until(2, root, tmp_path / "stopped")
    assert not differing(straight, train_until(None, root, tmp_path / "stopped"))


def test_a_trained_run_samples_without_encoder_and_projection(tmp_path):
    with session(small(*SETTINGS), tmp_path) as training:
        fit(training)
        training.save_weights(tmp_path / "weights")
    (config,) = tmp_path.glob("*/config.yaml")
    system = load_system(config.parent)
    assert system.features is None and sampled(system).isfinite().all()
    plain = build_system(wire(small(*SETTINGS[1 + len(WORDS) :])))
    for path in (config.parent, tmp_path / "weights" / "weights_ema.safetensors"):
        init_from(plain, path)
        assert torch.equal(plain.backbone.patch_in.weight, system.backbone.patch_in.weight)


def test_chosen_weights_do_not_leave_out_the_projection(tmp_path):
    with session(small(*SETTINGS, "trainable=[attn]"), tmp_path) as training:
        assert all(p.requires_grad for p in training.system.method.parameters())


BAD = {
    "no encoder": (("method=repa",), "features=null: method=repa reads features of clean frames"),
    "an encoder too many": (("features=words",), "features=words: method=denoising reads no"),
    "an unknown block": (("method=repa", "features=words", "method.module=blocks.9"),
                         "want blocks from blocks.0 to blocks.3"),
    "no block": (("method=repa", "features=words", "method.module=patch_in"),
                 "module=patch_in: want a block: blocks.0"),
    "shards": (("method=repa", "features=words", "trainer=fsdp2"), "has weights that stay in one"),
    "no file": (("method=repa", "features=dinov2"), "features.weights=null: name the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_before_anything_is_built(name):
    words, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        check_and_wire(composed(*words))
