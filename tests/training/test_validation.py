"""callbacks.val_loss.times: the denoising loss at fixed times, paired over runs."""

from __future__ import annotations

import json

import pytest
import torch

from plugins.callbacks.val_loss import ValLoss
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Conditions, ConfigError
from sandbox.data.loader import batches
from sandbox.runs.run import Run
from sandbox.training.build import build_system
from sandbox.training.validation import (
    MEAN,
    centres,
    draws_of_clips,
    final_means,
    losses_at_times,
    protocol_at_times,
    time_at,
    time_names,
)
from tests.helpers import TINY, composed, plugin_configs, tiny, wired_around, with_role_weights
from tests.training_sessions import record, session, small

AT_TIMES = ("callbacks=[val_loss]", "callbacks.val_loss.every=2", "callbacks.val_loss.times=4")
SEVERAL = [k for g in ("schedule", "method", "loss") for k, _ in plugin_configs(g)]


def losses(system, count=5, bins=3):
    items = registry.create(system.root.data).split("val")
    return losses_at_times(system.eval(), items, count, bins)


@pytest.mark.parametrize("key", SEVERAL)
def test_every_schedule_method_and_loss_has_losses_at_fixed_times(key, tmp_path):
    group, cfg = key.partition("/")[0], dict(plugin_configs(key.partition("/")[0]))[key]
    wiring = with_role_weights(wired_around(group, cfg), tmp_path)
    found = losses(build_system(wiring))
    assert tuple(found) == time_names(3)
    values = torch.tensor([*found.values()])
    assert values.isfinite().all()
    assert found[MEAN] == pytest.approx(values[:-1].mean().item())


@pytest.mark.parametrize("key", [k for k, _ in plugin_configs("schedule")])
def test_times_are_equidistant_from_clean_to_noise(key):
    schedule = registry.create(dict(plugin_configs("schedule"))[key])
    t = torch.stack([time_at(schedule, place) for place in centres(8)])
    steps = t.double().diff()
    assert (steps > 0).all() and (
        steps - steps.mean()
    ).abs().max() <= 1e-6 + t.is_floating_point() * 0
    assert (schedule.sigma(t).flatten().diff() > 0).all()
    end = 1 if t.is_floating_point() else int(schedule.times(1, "trailing")[0]) + 1
    assert t[0].item() == pytest.approx(end / 16, abs=1) and t[-1].item() < end


class Clean(torch.nn.Module):
    """A network that predicts the velocity of clips that are 0: the loss is mean(z0^2) / t^2."""

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, cond: Conditions) -> torch.Tensor:
        return z_t / (t.view(-1, 1, 1, 1, 1) / 1000)


def test_the_loss_of_a_known_network_has_its_analytic_value_at_each_time():
    system = build_system(wire(tiny()))
    system.backbone = Clean()
    items = registry.create(system.root.data).split("val")
    batch = next(batches(items, 5))
    with torch.no_grad():
        z0 = system.latents(batch, draws_of_clips(batch.ids, system.device))
    power = z0.square().mean().item()
    found = losses(system)
    for place in centres(3):
        assert found[f"val_times/{place:.4f}"] == pytest.approx(power / place**2, rel=1e-4)


def test_noise_depends_on_the_clip_alone():
    like = torch.zeros(2, 3)
    one, other = (draws_of_clips(ids, torch.device("cpu")) for ids in (["a", "b"], ["b", "c"]))
    assert torch.equal(one.normal("x", like)[1], other.normal("x", like)[0])
    assert not torch.equal(one.normal("x", like)[0], other.normal("x", like)[0])


def test_runs_of_other_seeds_batch_sizes_and_dropping_measure_equal_weights_equally():
    one = build_system(wire(tiny()))
    others = [o for o in TINY if not o.startswith("data.batch_size")]
    other = build_system(
        wire(composed(*others, "seed=7", "data.batch_size=5", "conditioning.drop_text=0.9"))
    )
    other.load_state_dict(one.state_dict())
    assert losses(one) == losses(other)


def test_the_first_clips_are_measured_whatever_the_size_of_a_batch(monkeypatch):
    system = build_system(wire(tiny()))
    at_once = losses(system)
    monkeypatch.setattr("sandbox.training.validation.BATCH", 2)
    assert losses(system) == pytest.approx(at_once, rel=1e-4)


def test_a_run_logs_both_weights_and_may_select_checkpoints_by_them(tmp_path):
    best = ("checkpoint.every=2", "checkpoint.best=1", f"checkpoint.best_of={MEAN}_ema")
    root = small("steps=2", *AT_TIMES, *best, "logger=csv")
    record(root, tmp_path)
    (path,) = tmp_path.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = [r for r in rows if MEAN in r]
    assert row["step"] == 2
    assert {n for n in row if "val_times" in n} == {
        name + ending for name in time_names(4) for ending in ("", "_ema")
    }
    assert {"val/loss", "val/loss_ema"} <= row.keys()


def test_measuring_at_times_changes_no_other_loss(tmp_path):
    with session(small(), tmp_path) as training:
        training.validate(4)
        plain = training.measured[1]
        training.validate(4, times=2)
    assert plain.items() <= training.measured[1].items()


def test_losses_of_runs_are_comparable_where_noise_levels_and_weights_at_the_times_are():
    def protocol(*overrides: str):
        return protocol_at_times(build_system(wire(composed(*TINY, *overrides))), 8, 4)

    plain = protocol()
    assert plain == protocol("schedule.mean=0", "schedule.t_draw=independent", "seed=3")
    assert plain["sigma"] == centres(4)
    ddpm = protocol("schedule=ddpm")
    assert ddpm != plain and ddpm != protocol("schedule=ddpm", "schedule.min_snr_gamma=5")


def test_the_last_means_are_those_of_the_last_validation(tmp_path):
    root = small("steps=4", *AT_TIMES)
    record(root, tmp_path)
    (path,) = tmp_path.rglob("metrics.jsonl")
    run = Run(path.parent)
    found = final_means(run)
    assert [*found] == [MEAN, f"{MEAN}_ema"]
    assert found[MEAN] == run.metrics()[4][MEAN]


def test_the_callback_names_what_the_engine_measures():
    assert ValLoss.Config(times=5).metrics() == time_names(5)
    assert ValLoss.Config().metrics() == ()
    assert list(ValLoss.Config(times=-1).problems())


def test_a_first_stage_has_no_times():
    with pytest.raises(ConfigError, match=r"callbacks.val_loss: measures .*a first stage"):
        wire(composed("task=train_vae", "vae=kl", *AT_TIMES))
