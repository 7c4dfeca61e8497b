"""Real sweeps and ranks from the command line: launchers, a failing job, W&B, torchrun, signals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from sandbox.storage import checkpoint
from tests.command import CHECKOUT, PATIENT_RAY, SMALL, folder_of, reached, run_until, said
from tests.training_sessions import differing

pytestmark = pytest.mark.slow
DDP = ("trainer=ddp", "steps=6", "trainer.accumulate=1")
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=9"],
}


def command(out, *words, program=("run.py",), **environment):
    given = {w.partition("=")[0] for w in words}
    small = [w for w in SMALL if w.partition("=")[0] not in given]
    words = [*small, f"out={out}", f"cache={out}/cache", *words]
    return subprocess.run(
        [sys.executable, *program, *words], cwd=CHECKOUT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Launcher -> console output and folder of a sweep whose second job fails."""
    found = {}

    def sweep(launcher):
        if launcher not in found:
            package = "hydra_plugins.hydra_" + launcher.partition("_")[0] + "_launcher"
            if LAUNCHERS[launcher] and importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
            out = tmp_path_factory.mktemp(launcher)
            # A learning rate so large that the second step overflows.
            words = [*DDP, *LAUNCHERS[launcher], "logger=wandb", "-m", "lr=1e-3,1e38,2e-3"]
            words.append("lr_schedule=constant")
            found[launcher] = command(out, *words), out
        return found[launcher]

    return sweep


RAY = ("hydra/launcher=ray_local", "+hydra.launcher.ray.init.include_dashboard=false")
OPTUNA = (
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=2",
    "hydra.sweeper.direction=minimize",
    "hydra/sweeper/sampler=random",
    "hydra.sweeper.sampler.seed=0",
)


def test_ray_runs_the_jobs_of_a_sweep_in_parallel(tmp_path):
    done = command(tmp_path, "-m", "lr=1e-3,2e-3", "steps=3", *RAY, **PATIENT_RAY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(folders(tmp_path)) == [1e-3, 2e-3]
    assert done.stdout.count("): done") == 2
    (page,) = tmp_path.glob("sweeps/*/report/report.html")
    assert "lr" in page.read_text()


def test_optuna_searches_by_the_objective_of_its_jobs(tmp_path):
    words = ("-m", "lr=tag(log,interval(1e-4,1e-2))", "steps=3", "task.objective=loss")
    done = command(tmp_path, *words, *OPTUNA)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((f / "result.json").read_text()) for f in folders(tmp_path).values()]
    assert len(found) == 2
    (best,) = tmp_path.glob("sweeps/*/optimization_results.yaml")
    value = yaml.safe_load(best.read_text())["best_value"]
    assert value == min(r["objective"] for r in found) == min(r["loss"] for r in found)


def folders(out):
    """Run folders by learning rate."""
    files = [*out.glob("*/config.yaml")]
    return {yaml.safe_load(f.read_text())["lr"]: f.parent for f in files}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_job_does_not_stop_the_others(sweeps, launcher):
    done, out = sweeps(launcher)
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stdout.count("): done") == 2
    assert "failed (exit code 4): step 2: " in done.stdout
    assert "Traceback" not in done.stderr
    finished = [lr for lr, f in folders(out).items() if (f / "result.json").is_file()]
    assert sorted(finished) == [1e-3, 2e-3]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_job_is_one_run_of_wandb_and_one_folder(sweeps, launcher):
    _, out = sweeps(launcher)
    assert sorted(folders(out)) == [1e-3, 2e-3, 1e38]
    for folder in folders(out).values():
        assert len([*folder.glob("**/*.wandb")]) == 1, folder


@pytest.mark.parametrize("launcher", [*LAUNCHERS][1:])
def test_a_job_produces_the_same_weights_under_every_launcher(sweeps, launcher):
    one, other = (folders(sweeps(name)[1])[1e-3] for name in ("basic", launcher))
    states = [checkpoint.load(checkpoint.newest(f / "checkpoints")) for f in (one, other)]
    assert not differing(*states)


@pytest.mark.exhaustive
def test_under_torchrun_the_command_is_a_rank(tmp_path):
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py")
    done = command(tmp_path / "torchrun", *DDP, program=run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    plain = command(tmp_path / "plain", *DDP)
    assert plain.returncode == 0, plain.stderr
    both = [folder_of(tmp_path / name) for name in ("torchrun", "plain")]
    states = [checkpoint.load(checkpoint.newest(f / "checkpoints")) for f in both]
    assert not differing(*states)


@pytest.mark.exhaustive
def test_two_processes_after_kills_and_signals_equal_an_uninterrupted_run(tmp_path):
    words = (*DDP[:1], "steps=24", "data.num_workers=1")
    assert run_until(tmp_path / "a", None, signal.SIGKILL, *words) == 0, said(tmp_path / "a")
    out = tmp_path / "b"
    assert run_until(out, 5, signal.SIGKILL, *words) == -signal.SIGKILL
    assert run_until(out, reached(out) + 4, signal.SIGTERM, *words) == 75, said(out)
    assert run_until(out, reached(out) + 4, signal.SIGINT, *words) == 75, said(out)
    assert run_until(out, None, signal.SIGKILL, *words) == 0, said(out)
    one, other = folder_of(tmp_path / "a"), folder_of(out)
    states = [checkpoint.load(checkpoint.newest(f / "checkpoints")) for f in (one, other)]
    assert not differing(*states)
    scores = [json.loads((f / "result.json").read_text())["scores"] for f in (one, other)]
    assert scores[0] == scores[1]
