"""Networks in addition to the student: teachers, the EMA, critics; distillation, autoguidance."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sandbox.cli.jobs import check_and_wire
from sandbox.config.wiring import wire
from sandbox.contracts import AVERAGE, ConfigError, Role, StorageError
from sandbox.model.networks import MicroBatch, Networks
from sandbox.model.roles import Network
from sandbox.training.build import build_system, check_weights, load_system
from sandbox.training.loop import fit
from tests.helpers import composed, sampled
from tests.inputs import batch
from tests.training_sessions import differing, record, session, small, train_until

SETTINGS = ("steps=4", "checkpoint.every=2", "data.clips_per_epoch=8", "data.batch_size=4",
            "ema.decay=0.5")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A run of the tiny system whose weights are not those of its beginning."""
    out = tmp_path_factory.mktemp("teacher")
    with session(small(*SETTINGS, "lr=0.05"), out) as training:
        fit(training)
    (config,) = out.glob("*/config.yaml")
    return config.parent


def distilled(teacher: Path, *words: str):
    return small(*SETTINGS, "method=guidance_distillation", "guidance=none",
                 f"method.teacher={teacher}", *words)  # fmt: skip


def dmd(teacher: Path, *words: str):
    return small(*SETTINGS, "method=dmd", "guidance=none", "sampler=lcm", "sampler.steps=2",
                 "method.generator_steps=2", "method.turns=2", f"method.teacher={teacher}",
                 *words)  # fmt: skip


# --- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["", "weights_ema.safetensors"])
def test_a_student_that_equals_its_teacher_has_no_loss(teacher, tmp_path, weights):
    if weights:
        with session(small(*SETTINGS), tmp_path / "own") as training:
            training.system.load_trainable(load_system(teacher).trainable_state())
            training._save_weights(tmp_path / weights)
    path = tmp_path / weights if weights else teacher
    root = distilled(path, "method.guidance_scale=1")

    def start(system) -> None:
        system.load_trainable(load_system(teacher).trainable_state())

    losses = record(root, tmp_path, start).states[1]
    assert losses
    with session(root, tmp_path / "again", prepare=start) as training:
        clips = batch(training.system.wiring, 4)
        terms = training.system.step(clips, training.system.draws(clips))
    assert terms.per_sample.max() < 1e-10


def test_guidance_of_the_teacher_is_learned(teacher, tmp_path):
    with session(distilled(teacher, "method.guidance_scale=3"), tmp_path) as training:
        system = training.system
        clips = batch(system.wiring, 4)
        model, example = Networks(system), MicroBatch(system, clips, system.draws(clips))
        z, t = torch.randn_like(example.z0), torch.full((4,), 0.5)
        full = model(z, t, example.conditions(frozenset(), "teacher"), role="teacher").raw
        none = example.conditions(frozenset(example.signals), "teacher")
        uncond = model(z, t, none, role="teacher").raw
        other = load_system(teacher)
        with torch.no_grad():
            conditions = MicroBatch(other, clips, other.draws(clips)).conditions(frozenset())
            assert torch.equal(full, Networks(other)(z, t, conditions).raw)
        assert not torch.equal(full, uncond) and not full.requires_grad


def test_a_teacher_may_have_another_size(teacher, tmp_path):
    root = distilled(teacher, "backbone.width=16", "conditioning.width=16")
    state = train_until(None, root, tmp_path)
    assert state["step"] == 4
    assert not any(name.startswith("networks") for name in state["weights"])


def test_another_teacher_is_refused_when_a_run_resumes(teacher, tmp_path):
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    root = distilled(own)
    train_until(2, root, tmp_path / "out")
    for path in own.glob("checkpoints/step_00000004.*"):
        path.unlink()
    with pytest.raises(StorageError, match=r"networks\.teacher"):
        train_until(None, root, tmp_path / "out")


# --- a critic -------------------------------------------------------------------------------------


def test_a_critic_has_its_turns_and_starts_as_the_teacher(teacher, tmp_path):
    with session(dmd(teacher), tmp_path) as training:
        first = {k: v.clone() for k, v in training.system.networks["critic"].state_dict().items()}
        theirs = training.system.networks["teacher"].state_dict()
        assert not differing(first, dict(theirs))
        fit(training)
        updates = training.system.updates["critic"].optimizer.state_dict()["state"]
        assert {int(s["step"]) for s in updates.values()} == {8}  # 2 turns in each of 4 steps
        assert differing(first, dict(training.system.networks["critic"].state_dict()))
        assert not differing(dict(theirs), dict(training.system.networks["teacher"].state_dict()))


def test_an_update_of_the_critic_changes_nothing_else(teacher, tmp_path):
    with session(dmd(teacher), tmp_path) as training:
        system = training.system
        before = {k: v.clone() for k, v in system.trainable_state().items()}
        critic = {k: v.clone() for k, v in system.networks["critic"].state_dict().items()}
        system.update_networks(batch(system.wiring, 2), 1.0, 1.0, True)
        assert not differing(before, system.trainable_state())
        assert differing(critic, dict(system.networks["critic"].state_dict()))
        assert all(p.grad is None for p in system.parameters())


def test_three_networks_resume_bit_for_bit(teacher, tmp_path):
    root = dmd(teacher)
    straight = train_until(None, root, tmp_path / "straight")
    train_until(2, root, tmp_path / "stopped")
    assert not differing(straight, train_until(None, root, tmp_path / "stopped"))


def test_the_generator_samples_with_its_number_of_steps(teacher, tmp_path):
    with session(dmd(teacher), tmp_path) as training:
        fit(training)
        assert sampled(training.system.eval()).isfinite().all()


def test_a_copy_shares_frozen_parts_and_has_no_gradients(tmp_path):
    system = build_system(wire(small(*SETTINGS)), tmp_path)
    network = Network(system.backbone, system.conditioner)
    network.frozen = [system.backbone.patch_in]
    new = network.copy()
    assert new.backbone.patch_in is system.backbone.patch_in
    assert new.backbone.patch_out is not system.backbone.patch_out
    assert not any(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize("bad", ["critic", "student"])
def test_a_bad_step_leaves_the_critic_as_it_is(teacher, tmp_path, bad):
    """In step 3, one of its two turns has a loss that is not finite, or the student has."""
    root = dmd(teacher, "trainer.bad_step=skip")

    def prepare(system) -> None:
        method, calls = system.method, iter(range(99))
        name = "update" if bad == "critic" else "__call__"
        published, at = getattr(type(method), name), 4 if bad == "critic" else 2

        class Poisoned(type(method)):
            pass

        def poisoned(self, *given):
            terms = published(self, *given)
            factor = float("nan") if next(calls) == at else 1.0
            return replace(terms, total=terms.total * factor)

        setattr(Poisoned, name, poisoned)
        method.__class__ = Poisoned

    states = record(root, tmp_path, prepare).states
    critic = {n: s["networks"]["critic"] for n, s in states.items()}
    turns = {n: {int(x["step"]) for x in c["optimizer"]["state"].values()}
             for n, c in critic.items()}  # fmt: skip
    skipped = 1 if bad == "critic" else 2
    assert turns == {1: {2}, 2: {4}, 3: {6 - skipped}, 4: {8 - skipped}}
    assert all(x.isfinite().all() for x in critic[4]["weights"].values())
    same = not differing(states[2]["weights"], states[3]["weights"])
    assert same == (bad == "student")
    (found,) = states[4]["skipped"]
    assert found["step"] == 3 and found.get("networks") == (["critic"] if bad == "critic" else None)


def test_the_gradient_of_a_critic_is_clipped(teacher, tmp_path):
    def first_moments(*words: str) -> float:
        with session(dmd(teacher, "steps=1", "method.turns=1", *words), tmp_path) as training:
            fit(training)
            states = training.system.updates["critic"].optimizer.state.values()
            return torch.stack([s["exp_avg"].norm() for s in states]).norm().item()

    free = first_moments("trainer.clip=null")
    assert first_moments(f"trainer.clip={free}") == pytest.approx(0.1 * free, rel=0.01)  # 1 - beta1


# --- the EMA --------------------------------------------------------------------------------------


def test_the_role_ema_is_the_student_with_its_averages(tmp_path, monkeypatch):
    root = small(*SETTINGS)
    monkeypatch.setattr(type(root.method), "roles", lambda self: {"average": Role(AVERAGE)})
    with session(root, tmp_path) as training:
        fit(training)
        system = training.system.eval()
        clips = batch(system.wiring, 3)
        model, example = Networks(system), MicroBatch(system, clips, system.draws(clips))
        z, t = torch.randn_like(example.z0), torch.full((3,), 0.5)
        got = model(z, t, example.conditions(frozenset(), "average"), role="average").raw
        with torch.no_grad(), training.ema_weights():
            example = MicroBatch(system, clips, system.draws(clips))
            want = model(z, t, example.conditions(frozenset())).raw
        assert torch.equal(got, want) and not got.requires_grad
        live = model(z, t, MicroBatch(system, clips, system.draws(clips)).conditions(frozenset()))
        assert not torch.equal(got, live.raw)


# --- autoguidance ---------------------------------------------------------------------------------


def test_a_weak_network_of_another_size_guides(teacher, tmp_path):
    """One Euler step from noise z: z0 = z - t (weak + scale (full - weak))."""
    words = "backbone.width=16", "conditioning.width=16", "lr=0.05"
    with session(small(*SETTINGS, *words), tmp_path) as training:
        fit(training)
    (config,) = tmp_path.glob("*/config.yaml")
    chosen = composed("guidance=autoguidance", f"guidance.weak={config.parent}",
                      "guidance.guidance_scale=3", "sampler=euler", "sampler.steps=1")  # fmt: skip
    own = replace(load_system(teacher).root, guidance=chosen.guidance, sampler=chosen.sampler)
    system = load_system(teacher, wiring=wire(own)).eval()
    clips = batch(system.wiring, 3)
    draws = system.draws(clips)

    def velocity(network, z):
        cond = MicroBatch(network, clips, draws).conditions(frozenset())
        return Networks(network)(z, t.expand(3), cond).raw

    with torch.no_grad():
        t = system.schedule.times(1, "trailing")
        z = draws.normal("start", MicroBatch(system, clips, draws).z0)
        full, weak = velocity(system, z), velocity(load_system(config.parent).eval(), z)
        want = system.first_stage.decode(z - t * (weak + 3 * (full - weak)), draws).clamp(-1, 1)
    assert (full - weak).abs().max() > 0.03
    assert (system.sample(clips) - want).abs().max() < 1e-5


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "no teacher": ("method=dmd guidance=none sampler=lcm", "method.teacher=null: name the file"),
    "a lost teacher": (
        "method=guidance_distillation guidance=none method.teacher=lost",
        "method.teacher=lost: no such file or folder",
    ),
    "guided twice": (
        "method=guidance_distillation guidance=cfg method.teacher=TEACHER",
        "guidance=cfg would guide twice",
    ),
    "another sampler": ("method=dmd guidance=none sampler=euler method.teacher=TEACHER",
                        "use sampler=lcm"),
    "another number of steps": (
        "method=dmd guidance=none sampler=lcm sampler.steps=9 method.teacher=TEACHER",
        "method.generator_steps=4, and sampler.steps=9",
    ),
    "accumulation": (
        "method=dmd guidance=none sampler=lcm trainer.accumulate=2 method.teacher=TEACHER",
        "needs trainer.accumulate=1",
    ),
    "fp16": ("method=dmd guidance=none sampler=lcm precision=fp16 method.teacher=TEACHER",
             "precision=fp16: method=dmd trains a second network"),
    "shards": ("method=dmd guidance=none sampler=lcm trainer=fsdp2 method.teacher=TEACHER",
               "shards the weights"),
    "numbers that a guide lacks": (
        "method=mean_flow guidance=autoguidance guidance.weak=TEACHER",
        "tells the network step_size, which that one does not take",
    ),
    "no weak network": ("guidance=autoguidance", "guidance.weak=null: name the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_before_anything_is_built(name, teacher):
    words, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        check_and_wire(composed(*words.replace("TEACHER", str(teacher)).split()))


def test_a_teacher_with_further_numbers_is_refused(tmp_path):
    with session(small(*SETTINGS, "method=mean_flow", "guidance=none"), tmp_path) as training:
        fit(training)
    (config,) = tmp_path.glob("*/config.yaml")
    with pytest.raises(ConfigError, match="takes step_size of method=mean_flow"):
        check_weights(wire(distilled(config.parent)))


@pytest.mark.parametrize(
    "words, message",
    [
        (("schedule=ddpm",), "schedule=ddpm: the weights of .* were trained with schedule=flow"),
        (("vae.components=8",), "vae.components=8: the weights of"),
    ],
)
def test_a_teacher_of_another_latent_space_or_target_is_refused(teacher, words, message):
    root = distilled(teacher, *words)
    with pytest.raises(ConfigError, match=f"method.teacher={teacher}: {message}"):
        check_weights(wire(root))
