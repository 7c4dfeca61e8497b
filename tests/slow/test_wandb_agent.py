"""Real `wandb sweep` and `wandb agent` against a fake server on localhost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sandbox.cli.main import _main
from tests.helpers import TINY
from tests.wandb_server import Server, serving

CHECKOUT = Path(__file__).resolve().parents[2]
WANDB = Path(sys.executable).with_name("wandb")
pytestmark = pytest.mark.slow


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a user who has never used W&B."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    # Rows are sent every second (default: 15 s); a trial has time to save on a busy machine.
    quick = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_AGENT_KILL_DELAY": "300"}
    return kept | quick | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}


def swept(folder: Path, server: Server, sweep: dict, *settings: str) -> str:
    """Console output of an agent that runs all trials of a sweep with additional settings."""
    command = ["${env}", sys.executable, str(CHECKOUT / "run.py"), *settings]
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**sweep, "command": [*command, "${args_no_hyphens}"]}))
    environ = environment(folder) | server.environment()
    said = ""
    for words in (["sweep", "--project", "test", str(file)], ["agent"]):
        if words == ["agent"]:
            words += [f"us/test/{[*server.sweeps][-1]}"]
        found = subprocess.run(
            [WANDB, *words], cwd=folder, env=environ, text=True, capture_output=True, timeout=900
        )
        said += found.stdout + found.stderr
        assert found.returncode == 0, said
    return said


SETTINGS = (
    *(s for s in TINY if not s.startswith(("logger", "steps"))), "logger=wandb",
    "logger.timeout=120", "trainer.log_every=1", "task.score_clips=2", "task.samples=1",
    "task.untrained=false",
    "metric=digits", "metric.reference=200",
)  # fmt: skip


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """A sweep of two trials, the second stopped early: server, folder and console output."""
    folder = tmp_path_factory.mktemp("sweep")
    parameters = {"lr": {"value": 1e-3}, "seeds": {"value": 2}, "steps": {"values": [3, 100_000]},
                  "data": {"value": {"clips_per_epoch": 12}},
                  "trainer.clip": {"value": None}}  # fmt: skip
    sweep = {"program": "run.py", "method": "grid", "parameters": parameters}
    settings = [s for s in SETTINGS if not s.startswith("data.clips")]
    settings += ["logger.requeue=true", f"out={folder}/out", f"cache={folder}/cache"]
    with serving() as server:
        server.stop_after = {"sweep0-1": 3}
        said = swept(folder, server, sweep, *settings)
        yield server, folder, said


def test_each_trial_is_one_run_with_its_nested_configuration(trials):
    server, _, said = trials
    own = [run for name, run in server.runs.items() if name.startswith("sweep0-")]
    assert [run.name for run in own] == ["sweep0-0", "sweep0-1"], said
    for run, steps in zip(own, (3, 100_000), strict=True):
        cfg = run.config["cfg"]["value"]
        assert (cfg["lr"], cfg["steps"], cfg["trainer"]["clip"]) == (1e-3, steps, None)
        assert cfg["backbone"]["plugin"] == "backbone/dit"
        assert cfg["data"]["clips_per_epoch"] == 12  # an agent passes None and dictionaries
        assert run.config["steps"]["value"] == steps  # the sweep's own key


def test_the_other_seeds_of_a_trial_are_separate_runs(trials):
    server, folder, said = trials
    other = [run for name, run in server.runs.items() if not name.startswith("sweep0-")]
    assert [(r.group, r.sweep, r.exit_code) for r in other] == [("sweep0-0", None, 0)], said
    assert other[0].config["cfg"]["value"]["seed"] == 1
    both = [json.loads(p.read_text())["scores"] for p in (folder / "out").glob("*/result.json")]
    mean = sum(s["digit"] for s in both) / 2
    summary = server.runs["sweep0-0"].summary
    assert (summary["seeds"], summary["score/digit"]) == (2, pytest.approx(mean))


def test_a_finished_trial_has_history_scores_and_a_video(trials):
    run = trials[0].runs["sweep0-0"]
    assert run.exit_code == 0
    assert [row["_step"] for row in run.history if "loss" in row] == [1, 2, 3]
    assert any(name.startswith("score/") for name in run.summary)
    assert any(name.endswith(".mp4") for name in run.files)


def test_a_trial_that_is_stopped_early_saves_and_exits(trials):
    server, folder, said = trials
    assert server.sweeps["sweep0"].ended == {"sweep0-1"}
    assert server.runs["sweep0-1"].exit_code == 75, said
    ids = {p.read_text().strip(): p.parent for p in (folder / "out").glob("*/wandb_id")}
    kept = ids["sweep0-1"]
    last = json.loads((kept / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    names = " ".join(p.name for p in (kept / "checkpoints").iterdir())
    assert re.search(rf"0*{last}\b", names)
    assert not (kept / "result.json").exists()


def test_a_requeued_trial_resumes(trials):
    server, folder, said = trials
    (name, before), *_ = server.sweeps["sweep0"].again.items()
    assert name == "sweep0-1" and before >= 3
    steps = [row["_step"] for row in server.runs[name].history if "loss" in row]
    assert len(steps) > before and steps == sorted(set(steps))
    kept = [p.parent for p in (folder / "out").glob("*/wandb_id") if p.read_text().strip() == name]
    assert len(kept) == 1, said  # one folder, started twice
    assert len(json.loads((kept[0] / "environment.json").read_text())["earlier"]) == 1


def test_a_report_is_sent_to_the_sweep_of_its_runs(trials):
    server, folder, _ = trials
    words = ["task=report", f"runs={folder}/out", "task.send=true", "logger=wandb",
             "logger.timeout=120", f"out={folder}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(CHECKOUT / "run.py"), *words], cwd=folder, text=True,
        capture_output=True, timeout=900, env={**environment(folder), **server.environment()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = [r for r in server.runs.values() if any("media/html/report" in f for f in r.files)]
    (run,) = pages
    assert run.sweep == "sweep0" and run.exit_code == 0
    names = " ".join(run.files)
    assert "media/table/scores" in names and "media/images/samples" in names


def test_an_offline_report_is_synced_to_its_sweep(trials, monkeypatch):
    server, folder, _ = trials
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    out = folder / "offline"
    words = [f"runs={folder}/out", "task.send=true", "logger.mode=offline", f"task.to={out}"]
    before = {*server.runs}
    assert _main(["task=report", *words]) == 0
    assert {*server.runs} == before
    (kept,) = out.glob("wandb/offline-run-*")
    done = subprocess.run(
        [WANDB, "sync", str(kept)], cwd=folder, text=True, capture_output=True, timeout=900,
        env={**environment(folder), **server.environment()},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (new,) = server.runs.keys() - before  # of a sweep, W&B chooses the number itself
    run = server.runs[new]
    assert run.sweep == "sweep0", done.stdout
    assert any("media/html/report" in name for name in run.files)


def test_a_search_stops_worse_trials_early_and_they_save(tmp_path):
    """conf/sweep/bayes.yaml, with learning rate 0 for the worse trial."""
    sweep = yaml.safe_load((CHECKOUT / "conf" / "sweep" / "bayes.yaml").read_text())
    sweep["parameters"] |= {"lr": {"values": [4e-3, 0.0]}, "steps": {"values": [4, 100_000]}}
    fixed = [w for w in sweep["command"] if not w.startswith("${")]
    wide = [s for s in SETTINGS if not s.startswith(("backbone.width", "conditioning.width"))]
    settings = [*fixed, *wide, "callbacks.val_loss.every=1", "callbacks.val_loss.clips=2",
                "lr_schedule.warmup=0", f"out={tmp_path}/out", f"cache={tmp_path}"]  # fmt: skip
    with serving() as server:
        said = swept(tmp_path, server, {**sweep, "run_cap": 2}, *settings)
    good, bad = (server.runs[f"sweep0-{i}"] for i in range(2))
    assert server.sweeps["sweep0"].ended == {"sweep0-1"}, said
    assert (good.exit_code, bad.exit_code) == (0, 75), said
    assert len([row for row in good.history if "val/loss" in row]) == 4
    widths = [r.config["cfg"]["value"]["backbone"]["width"] for r in (good, bad)]
    assert widths == [32, 64]
    kept = {p.read_text().strip(): p.parent for p in (tmp_path / "out").glob("*/wandb_id")}
    assert (kept["sweep0-0"] / "result.json").is_file()
    assert not (kept["sweep0-1"] / "result.json").exists()
    assert any((kept["sweep0-1"] / "checkpoints").iterdir())  # for a resume
    assert server.refused == []


def test_the_fake_server_answers_every_request(trials):
    assert trials[0].refused == []
