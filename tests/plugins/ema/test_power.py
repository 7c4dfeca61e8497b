"""Power-function averages, and averages of other widths from their snapshots."""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from plugins.ema.power import PowerFunction, gamma_of, power_decay
from sandbox.config.wiring import wire
from sandbox.contracts import ConfigError, Snapshot, StorageError
from sandbox.model.ema import EMA
from sandbox.storage import weight_files
from sandbox.storage.snapshots import find_snapshots
from sandbox.tasks.ema import SynthesiseEMA
from sandbox.training.build import load_system
from sandbox.training.loop import fit
from tests.training_sessions import differing, session, small, train_until

ENGINE = ("ema=power", "ema.snapshot_every=2", "steps=6", "checkpoint.every=3")


def rule(*widths: float) -> PowerFunction:
    return PowerFunction(PowerFunction.Config(sigma_rels=widths))


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_requested_width(width):
    gamma = gamma_of(width)
    found = (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)
    assert found == pytest.approx(width, rel=1e-6)


def test_the_width_is_the_standard_deviation_of_the_weights_over_steps():
    """The weight of each of 4000 steps, from the decays alone."""
    power, steps = rule(0.1), 4000
    shares = np.zeros(steps)
    for n in range(1, steps + 1):
        shares *= power.decay(n)
        shares[n - 1] += 1 - power.decay(n)
    at = np.arange(1, steps + 1) / steps
    mean = shares @ at
    assert shares.sum() == pytest.approx(1)
    assert math.sqrt(shares @ (at - mean) ** 2) == pytest.approx(0.1, rel=1e-3)


def test_the_first_update_forgets_the_initial_weights():
    assert rule(0.05).decay(1) == 0


@cache
def trajectory() -> tuple[PowerFunction, dict[Snapshot, torch.Tensor], dict[float, torch.Tensor]]:
    """Snapshots of 1000 steps, and the tracked average of each width."""
    power, steps, model = rule(0.05, 0.1), 1000, nn.Linear(8, 8).double()
    g = torch.Generator().manual_seed(0)
    start = torch.randn(8, 8, generator=g, dtype=torch.float64)
    snapshots: dict[Snapshot, torch.Tensor] = {}
    ours = EMA(model, power.decay, power.others)
    widths = (0.05, 0.06, 0.075, 0.1, 0.15)
    others = {w: EMA(model, partial(power_decay, gamma_of(w))) for w in widths}
    for n in range(1, steps + 1):
        noise = torch.randn(8, 8, generator=g, dtype=torch.float64)
        model.weight.data = start * math.cos(3 * n / steps) + 0.01 * noise
        for ema in (ours, *others.values()):
            ema.update()
        if n % 20 == 0:
            found = zip((power.name, *power.others), ours.averages(), strict=True)
            snapshots |= {Snapshot(k, n): average["weight"].clone() for k, average in found}
    return power, snapshots, {w: ema.average["weight"] for w, ema in others.items()}


@pytest.mark.parametrize("width", [0.05, 0.06, 0.075, 0.1, 0.15])
def test_a_synthesised_average_equals_the_tracked_one(width):
    power, snapshots, tracked = trajectory()
    coefficients, error = power.synthesis([*snapshots], width, 1000)
    made = torch.stack([c * a for c, a in zip(coefficients, snapshots.values(), strict=True)])
    difference = (made.sum(0) - tracked[width]).norm() / tracked[width].norm()
    assert difference < 1e-4
    assert error < 1e-2


def test_the_error_of_the_profile_grows_with_the_distance_from_the_tracked_widths():
    power, snapshots, _ = trajectory()
    near, far = (power.synthesis([*snapshots], width, 1000)[1] for width in (0.075, 0.25))
    assert 0 < near < far < 1


def test_exponents_decays_and_coefficients_equal_those_of_ema_pytorch():
    judge = pytest.importorskip("ema_pytorch.post_hoc_ema")
    power, snapshots, _ = trajectory()
    assert gamma_of(0.075) == pytest.approx(judge.sigma_rel_to_gamma(0.075))
    theirs = judge.KarrasEMA(nn.Linear(1, 1), sigma_rel=0.05, update_every=1)
    theirs.step.fill_(9)  # it counts from 0
    assert power.decay(10) == pytest.approx(theirs.beta)
    some = [*snapshots][:12]
    t = torch.tensor([s.updates for s in some]).double()
    gamma = torch.tensor([power.gammas[s.name] for s in some]).double()
    end = torch.tensor([some[-1].updates]).double(), torch.tensor([gamma_of(0.075)]).double()
    expected = judge.solve_weights(t, gamma, *end).flatten()
    found, _ = power.synthesis(some, 0.075, some[-1].updates)
    assert found == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sigma_rels": (0.0, 0.3)}, ["sigma_rels[0]", "sigma_rels[1]"]),
        ({"sigma_rels": ()}, ["sigma_rels"]),
        ({"sigma_rels": (0.1, 0.1), "snapshot_every": 0}, ["sigma_rels", "snapshot_every"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(PowerFunction.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and the final state of its EMA."""
    with session(small(*ENGINE), tmp_path_factory.mktemp("power")) as training:
        fit(training)
        return training.run.folder, training.state()["ema"]


def synthesise(folder, **settings):
    config = SynthesiseEMA.Config(run=str(folder), **settings)
    return SynthesiseEMA(config)(wire(small(*ENGINE)))


def test_snapshots_are_written_at_the_interval_and_at_the_end(run):
    step, found = find_snapshots(run[0])
    names = ["sigma_rel_0.05", "sigma_rel_0.1"]
    assert step == 6
    assert [*found.values()] == [Snapshot(name, n) for n in (2, 4, 6) for name in names]
    last = weight_files.read(run[0] / "ema" / "step_00000006" / "sigma_rel_0.1.safetensors")
    assert not differing(last, run[1]["others"]["sigma_rel_0.1"])


def test_the_synthesised_weights_of_a_tracked_width_are_the_tracked_ones(run, tmp_path):
    folder, state = run
    made = synthesise(folder, sigma_rel=0.1, to=str(tmp_path / "a.safetensors"))
    system = load_system(folder, made["file"])
    parameters = dict(system.named_parameters())
    for name, average in state["others"]["sigma_rel_0.1"].items():
        torch.testing.assert_close(parameters[name].detach(), average, rtol=1e-4, atol=1e-5)


def test_an_average_can_end_at_an_earlier_snapshot(run):
    folder, _ = run
    made = synthesise(folder, sigma_rel=0.05, step=4)
    assert made["file"].endswith("sigma_rel_0.05_step_4.safetensors")
    tracked = weight_files.read(folder / "ema" / "step_00000004" / "sigma_rel_0.05.safetensors")
    found = weight_files.read(folder / "ema" / "sigma_rel_0.05_step_4.safetensors")
    for name, average in tracked.items():
        torch.testing.assert_close(found[name], average, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"task\.step=5: .* want 2, 4, 6"):
        synthesise(folder, step=5)


def test_a_stopped_run_continues_bit_for_bit(run, tmp_path):
    root = small(*ENGINE)
    train_until(4, root, tmp_path)
    resumed = train_until(None, root, tmp_path)
    assert not differing(run[1], resumed["ema"])


def test_runs_and_widths_without_an_answer_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"task\.sigma_rel=0\.5: want > 0"):
        synthesise(run[0], sigma_rel=0.5)
    with session(small("ema=warmup"), tmp_path) as training:
        other = training.run.folder
    with pytest.raises(ConfigError, match=r"ema=warmup.*want a run with ema=power"):
        synthesise(other)


def test_weights_of_another_system_are_refused(run, tmp_path):
    folder, _ = run
    system = load_system(folder)
    few = dict(list(system.trainable_state().items())[:-1])
    for metadata, part in (({}, "first stage"), (system.first_stage_hash(), "do not fit")):
        path = weight_files.write(few, tmp_path / "few.safetensors", metadata)
        with pytest.raises(StorageError, match=rf"task\.weights=.*few.*{part}"):
            load_system(folder, str(path))


def test_averages_of_other_widths_cannot_be_resumed():
    model = nn.Linear(2, 2)
    power, other = rule(0.05, 0.1), rule(0.05, 0.2)
    state = EMA.of(model, power).state_dict()
    with pytest.raises(StorageError, match=r"sigma_rel_0\.1, this run has sigma_rel_0\.2"):
        EMA.of(model, other).load_state_dict(state)
