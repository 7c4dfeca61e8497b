"""Supervisors under Hydra's launchers, torchrun, srun and a scheduler's signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch_helpers import HERE, alive, lines, script, supervisor, wait_until

pytestmark = pytest.mark.slow

SWEEP = """
import json
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sandbox.launch import launch

ConfigStore.instance().store("config", {"seed": 0, "bad": 2, "out": "."})


@hydra.main(version_base="1.3", config_name="config")
def main(cfg):
    result = launch("launch_targets:total", OmegaConf.to_container(cfg), 2, preload=["torch"])
    Path(cfg.out, f"{cfg.seed}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    ],
    ids=["basic", "joblib", "submitit"],
)
def test_a_failing_job_of_a_sweep_is_reported_and_the_others_finish(launcher, tmp_path):
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP)
    words = ["-m", *launcher, "seed=1,2,3", f"out={tmp_path}", f"hydra.sweep.dir={tmp_path}/jobs"]
    done = subprocess.run(
        [sys.executable, str(path), *words],
        env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"},  # submitit runs another script
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "rank 1: ValueError: planned failure" in done.stderr
    found = {p.stem: json.loads(p.read_text())["total"] for p in tmp_path.glob("?.json")}
    assert found == {"1": 3.0, "3": 7.0}


# --- signals --------------------------------------------------------------------------------------


def test_data_workers_survive_sigterm_to_all_processes_until_the_run_stops(log):
    with supervisor("count_items", log) as process:
        wait_until(lambda: len(lines(log, "working")) == 2)
        assert len(alive(log)) >= 6  # two ranks with two workers each
        for pid in alive(log):  # as a scheduler does
            os.kill(pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 75, said
        assert "stopped by SIGTERM" in said
        assert len(set(lines(log, "stopped"))) == 1
        wait_until(lambda: not alive(log))  # a worker may take a moment to exit


def test_no_data_worker_outlives_a_killed_supervisor(log):
    with supervisor("count_items", log) as process:
        wait_until(lambda: len(lines(log, "working")) == 2)
        process.kill()
        process.communicate(timeout=300)
        wait_until(lambda: not alive(log))


def test_ctrl_c_while_the_server_imports_stops_at_the_first_step(log):
    imports, sent = log.with_name("imports"), log.with_name("sent")
    log.with_name("slow_import.py").write_text(
        f"import pathlib, time\npathlib.Path({str(imports)!r}).touch()\n"
        f"while not pathlib.Path({str(sent)!r}).exists(): time.sleep(0.02)\n"
    )
    with supervisor("count", log, ["slow_import", "torch"]) as process:
        wait_until(imports.exists)
        os.killpg(process.pid, signal.SIGINT)
        sent.touch()
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 75, said
        assert lines(log, "stopped") == ["stopped after 0"] * 2


# --- another launcher -----------------------------------------------------------------------------


def test_under_torchrun_each_process_is_one_rank(log):
    words = ["--standalone", "--nproc-per-node", "2", str(script("greet", log))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert lines(log, "heard") == ["heard 0", "heard 0"]
    assert done.stdout == "stdout of 0\n[0, {'from': 0}]\n"


def test_under_srun_each_process_is_one_rank(log):
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port is derived from it
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script("greet", log))],
            env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [r.communicate(timeout=300)[0] for r in ranks]
    assert [r.returncode for r in ranks] == [0, 0]
    assert lines(log, "heard") == ["heard 0", "heard 0"]
    assert said == ["stdout of 0\n[0, {'from': 0}]\n", ""]
