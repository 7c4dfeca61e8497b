"""Weights & Biases without a network: offline records, and when it goes online."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.logger.wandb import WandbLogger, _ensure_cache
from tests.wandb_server import serving

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """No credentials, no sweep agent, a temporary home."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # W&B reads its variables once per process


def logger(**settings) -> WandbLogger:
    return WandbLogger(WandbLogger.Config(**settings))


# --- mode -----------------------------------------------------------------------------------------


def test_auto_is_offline_without_credentials():
    assert logger().mode() == "offline"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SWEEP_ID"])
def test_auto_is_online_with_credentials_or_an_agent(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    assert logger().mode() == "online"


@pytest.mark.parametrize(
    ("host", "url", "mode"),
    [
        ("api.wandb.ai", "", "online"),
        ("my.host", "https://my.host:8080", "online"),
        ("my.host", "", "offline"),
    ],
)
def test_auto_is_online_with_netrc_credentials_for_the_host(monkeypatch, tmp_path, host, url, mode):
    (tmp_path / "netrc").write_text(f"machine {host}\n login user\n password {SECRET}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert logger().mode() == mode


def test_a_broken_netrc_counts_as_no_credentials(tmp_path):
    (tmp_path / "netrc").write_text("nonsense here")
    assert logger().mode() == "offline"


def test_wandb_mode_overrides_auto(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert logger().mode() == "disabled"


def test_disabled_logs_nothing(tmp_path):
    off = logger(mode="disabled")
    off.start(tmp_path, {}, "name", None)
    off.metrics(1, {"loss": 1.0})
    off.video(1, "v", tmp_path / "v.mp4")
    off.summary({"score": 1.0})
    off.finish(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "on"}, ["mode"]),
        ({"timeout": 0.0, "finish_timeout": float("nan")}, ["timeout", "finish_timeout"]),
        ({"project": "a/b"}, ["project"]),
        ({"project": ""}, ["project"]),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = WandbLogger.Config(**settings).problems()
    assert [p.partition("=")[0] for p in found] == named


# --- runs -----------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict]:
    """All records of all offline runs below `folder`, from W&B's reader."""
    tool = Path(sys.executable).with_name("wandb")
    found = []
    for path in sorted(folder.glob("wandb/*run-*/*.wandb")):
        record = subprocess.run(
            [str(tool), "leet", "inspect", "--json", str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([json.loads(line) for line in record.stdout.splitlines()])
    return found


def history(run: list[dict]) -> list[dict]:
    items = [r["history"]["item"] for r in run if r["type"] == "history"]
    return [{k: v for k, v in i.items() if k not in ("_runtime", "_timestamp")} for i in items]


def make_video(path: Path) -> Path:
    import av
    import numpy as np

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def test_an_offline_run_is_readable_and_resumes_under_its_id(tmp_path, monkeypatch, caplog):
    """One test for all that needs W&B to run: importing it costs a second."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "argv", ["run.py", f"x.api_key={SECRET}"])
    (tmp_path / "environment.json").write_text('{"code": {"commit": "abc"}}')
    config = {"backbone": {"plugin": "backbone/dit", "width": 64}, "lr": 1e-3,
              "task": {"plugin": "task/train"}}  # fmt: skip
    for steps in ((1, 2), (2, 3)):
        run = logger(tags=("a",))
        run.start(tmp_path, config, "my run", "my sweep")
        for step in steps:
            run.metrics(step, {"loss": step / 2, "val/score": 1.0})
        run.video(steps[-1], "sample", make_video(tmp_path / "clip.mp4"), "a red 3")
        run.summary({"score": 0.5})
        run.finish(75)
    first, second = records(tmp_path)

    (record,) = [r["run"] for r in first if r["type"] == "run"]
    (again,) = [r["run"] for r in second if r["type"] == "run"]
    assert record["config"]["update"]["cfg"] == config
    assert record["config"]["update"]["environment"]["code"] == {"commit": "abc"}
    assert record["job_type"] == "train" and record["tags"] == ["a"]
    updates = [r["config"]["update"] for r in first if r["type"] == "config"]
    assert {"backbone": "dit", "lr": 1e-3, "task": "train"} in updates
    assert (record["display_name"], record["run_group"], record["project"]) == (
        "my run",
        "my sweep",
        "sandbox",
    )
    assert record["run_id"] == again["run_id"] == (tmp_path / "wandb_id").read_text().strip()

    rows = history(first)
    assert [(r["_step"], r["loss"]) for r in rows if "loss" in r] == [(1, 0.5), (2, 1.0)]
    assert [(r["_step"], r["loss"]) for r in history(second) if "loss" in r] == [(2, 1.0), (3, 1.5)]
    assert rows[-1]["sample._type"] == "video-file" and rows[-1]["sample.caption"] == "a red 3"
    assert list(tmp_path.glob(f"wandb/*/files/{rows[-1]['sample.path']}"))
    assert [r["exit"]["exit_code"] for r in first if r["type"] == "exit"] == [75]
    assert SECRET not in json.dumps([first, second])
    assert "wandb sync" in caplog.text


def test_variables_of_wandb_count_and_a_setting_wins(monkeypatch):
    given = {"PROJECT": "theirs", "ENTITY": "team", "NAME": "mine", "RUN_GROUP": "old",
             "JOB_TYPE": "night", "TAGS": "a, b"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert logger()._named({}, "run", "sweep") == {
        "project": "theirs", "entity": "team", "name": "mine", "group": "old",
        "job_type": "night", "tags": ["a", "b"],
    }  # fmt: skip
    chosen = logger(project="ours", entity="me", job_type="day", tags=())
    found = chosen._named({}, "run", None)
    assert (found["project"], found["entity"], found["job_type"]) == ("ours", "me", "day")
    assert not found["tags"]


def test_an_agent_sets_the_run_id(tmp_path, monkeypatch):
    from plugins.logger.wandb import _run_id

    own = _run_id(tmp_path)
    assert _run_id(tmp_path) == own
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    assert _run_id(tmp_path) == own  # a stale variable
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert _run_id(tmp_path) == "trial7"


def at_a_terminal(folder: Path) -> str:
    """What a process that starts an online run shows at a terminal without any input."""
    import os
    import pty

    code = (
        "import pathlib, sys; from plugins.logger.wandb import WandbLogger as W\n"
        "w = W(W.Config(mode='online')); w.start(pathlib.Path(sys.argv[1]), {}, 'n', None)\n"
        "w.finish(0); print('went on')"
    )
    mine, its = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TERM": "xterm"},
    )
    try:
        child.wait(timeout=300)
    finally:
        child.kill()
        os.close(its)
        shown = os.read(mine, 100_000).decode()
        os.close(mine)
    return shown


@pytest.mark.slow
def test_no_prompt_at_a_terminal_without_credentials(tmp_path):
    assert "went on" in at_a_terminal(tmp_path)


@pytest.mark.slow
def test_an_unreachable_server_falls_back_to_offline_with_one_line(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)  # what the console shows
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = logger(timeout=1.0)
    run.start(tmp_path, {"lr": 1}, "name", None)
    run.metrics(1, {"loss": 2.0})
    run.finish(0)
    assert "recording offline" in caplog.text and "wandb sync" in caplog.text
    logged = [row["loss"] for record in records(tmp_path) for row in history(record)]
    assert logged == [2.0]


@pytest.mark.slow
def test_a_server_lost_during_a_run_loses_no_record(tmp_path, monkeypatch, caplog):
    """Metrics are still written to disk; the end waits, then reports the sync command."""
    caplog.set_level(logging.INFO)
    with serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        run = logger(timeout=120.0, finish_timeout=2.0)
        run.start(tmp_path, {"lr": 1}, "name", None)
        run.metrics(1, {"loss": 2.0})
    run.metrics(2, {"loss": 1.0})
    run.finish(0)
    assert list(server.runs) == [(tmp_path / "wandb_id").read_text().strip()]
    assert "wandb sync" in caplog.text
    logged = [row["loss"] for record in records(tmp_path) for row in history(record)]
    assert logged == [2.0, 1.0]


@pytest.mark.parametrize("kind", ["no HOME", "HOME is a file", "cache is a file", "XDG is a file"])
def test_without_a_cache_folder_a_run_is_recorded_without_noise(tmp_path, monkeypatch, kind):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("WANDB_DIR", str(file))
    for name in ("WANDB_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if kind == "no HOME":
        monkeypatch.delenv("HOME")
    else:
        names = {"HOME": "HOME", "cache": "WANDB_CACHE_DIR", "XDG": "XDG_CACHE_HOME"}
        monkeypatch.setenv(names[kind.split()[0]], str(file))
    _ensure_cache()
    assert Path(os.environ["WANDB_CACHE_DIR"]).is_dir()


def test_a_cache_folder_that_can_be_written_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "own"))
    _ensure_cache()
    assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path / "own")
