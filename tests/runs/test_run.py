"""The run folder: identity, locks, resume, metrics, secrets."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.config import registry
from sandbox.contracts import ConfigError, StorageError
from sandbox.runs import resume as runs
from sandbox.runs.identity import differences, identity
from sandbox.runs.resume import open_run
from sandbox.runs.run import Run

FORK = multiprocessing.get_context("fork")
CONFIG = {
    "lr": 1e-3,
    "steps": 100,
    "data": {"plugin": "data/x", "num_workers": 0, "betas": (0.9, 0.95)},
    "logger": {"plugin": "logger/csv"},
    "vae": None,
}


def but(**changes) -> dict:
    return {**CONFIG, **changes}


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"data": {**CONFIG["data"], "num_workers": 4}},
        {"logger": {"plugin": "logger/wandb", "mode": "offline"}},
        {"logger": None},
        {"out": "elsewhere"},
        {"checkpoint": {"every": 5}},
        {"resume": {"mode": "never"}},
        {"trainer": {"threads": 3}},
        {"data": {**CONFIG["data"], "betas": [0.9, 0.95]}},
    ],
)
def test_what_does_not_change_the_result_is_no_part_of_the_identity(change):
    assert identity(but(**change)) == identity(CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-3}, {"steps": 200}, {"vae": "x"}, {"new": 1}, {"data": {"plugin": "data/y"}}],
)
def test_everything_else_is(change):
    assert identity(but(**change)) != identity(CONFIG)


def test_differences_name_setting_old_and_new_value():
    new = {**but(lr=0.002), "seed": 1}
    del new["vae"]
    assert differences(CONFIG, new) == [
        "lr: 0.001 -> 0.002",
        "vae: null -> (absent)",
        "seed: (absent) -> 1",
    ]


def test_tuples_and_the_lists_that_yaml_makes_of_them_do_not_differ():
    assert differences({"betas": (0.9, 1e-5)}, {"betas": [0.9, 1e-5]}) == []


# --- which folder ---------------------------------------------------------------------------------


def test_same_command_continues_an_unfinished_run(tmp_path):
    with open_run(tmp_path, "default", CONFIG) as first:
        assert not first.resumed
    with open_run(tmp_path, "default", CONFIG) as second:
        assert second.resumed and second.folder == first.folder
    assert first.folder.name == f"default-{identity(CONFIG)}"


def test_finished_run_is_left_alone(tmp_path):
    with open_run(tmp_path, "default", CONFIG) as first:
        first.finish({"score": 1.0})
    with open_run(tmp_path, "default", CONFIG) as second:
        assert second.folder.name == first.folder.name + "-2" and not second.resumed
    assert json.loads(first.result.read_text()) == {"score": 1.0}


def test_run_in_use_is_left_alone(tmp_path):
    with open_run(tmp_path, "x", CONFIG) as first, open_run(tmp_path, "x", CONFIG) as second:
        assert second.folder.name == first.folder.name + "-2"


def test_a_process_that_is_just_ending_is_waited_for(tmp_path):
    """As the ranks of a command that was killed a moment before the same command again."""
    folder = open_run(tmp_path, "x", CONFIG)
    folder.close()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
    hold += " print(flush=True); time.sleep(0.2)"
    words = [sys.executable, "-c", hold, str(folder.folder / "lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with open_run(tmp_path, "x", CONFIG) as run:
            assert run.folder == folder.folder and run.resumed


def test_newest_unfinished_run_is_continued(tmp_path):
    opened = [open_run(tmp_path, "x", CONFIG) for _ in range(11)]
    opened[10].finish({})
    for run in opened:
        run.close()
    with open_run(tmp_path, "x", CONFIG) as run:
        assert run.folder == opened[9].folder  # -10: by number, not by letters


def test_never_starts_a_new_run(tmp_path):
    open_run(tmp_path, "x", CONFIG).close()
    with open_run(tmp_path, "x", CONFIG, resume="never") as run:
        assert run.folder.name.endswith("-2") and not run.resumed


def test_other_configuration_has_another_folder(tmp_path):
    with open_run(tmp_path, "x", CONFIG) as a, open_run(tmp_path, "x", but(steps=200)) as b:
        assert a.folder != b.folder and not b.folder.name.endswith("-2")


def test_name_becomes_one_folder_whatever_is_in_it(tmp_path):
    with open_run(tmp_path, "../a b/c", CONFIG) as run:
        assert run.folder.parent == tmp_path


def open_and_report(out: Path, barrier, results) -> None:
    barrier.wait()
    run = open_run(out, "x", CONFIG)
    results.put((run.folder.name, run.resumed))
    barrier.wait()


def test_five_simultaneous_starts_get_five_folders(tmp_path):
    barrier, results = FORK.Barrier(5), FORK.Queue()
    children = [
        FORK.Process(target=open_and_report, args=(tmp_path, barrier, results)) for _ in range(5)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=300) for _ in children]
    for child in children:
        child.join()
    assert len({name for name, _ in found}) == 5
    assert not any(resumed for _, resumed in found)


def hold_with_a_worker(out: Path, results) -> None:
    run = open_run(out, "x", CONFIG)
    worker = FORK.Process(target=time.sleep, args=(60,))
    worker.start()
    results.put((run.folder, worker.pid))
    time.sleep(60)


def test_killed_process_frees_its_run_though_its_worker_lives_on(tmp_path):
    results = FORK.Queue()
    child = FORK.Process(target=hold_with_a_worker, args=(tmp_path, results))
    child.start()
    folder, worker = results.get(timeout=300)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    try:
        with open_run(tmp_path, "x", CONFIG) as run:
            assert run.folder == folder and run.resumed
    finally:
        os.kill(worker, signal.SIGKILL)


# --- a named folder -------------------------------------------------------------------------------


def named(tmp_path: Path, config: dict = CONFIG, finished: bool = False) -> str:
    with open_run(tmp_path, "x", config) as run:
        if finished:
            run.finish({"steps": config["steps"]})
    return str(run.folder)


def test_finished_run_is_continued_with_more_steps_when_it_is_named(tmp_path):
    folder = named(tmp_path, finished=True)
    with open_run(tmp_path, "x", but(steps=200), resume=folder) as run:
        assert run.finished and run.config()["steps"] == 100
        run.accept()
        assert str(run.folder) == folder and run.resumed and not run.finished
        assert run.config()["steps"] == 200
        assert json.loads((run.folder / "result.earlier.json").read_text()) == {"steps": 100}


@pytest.mark.parametrize("change", [{"lr": 2.0}, {"steps": 50}, {"data": {"plugin": "data/y"}}])
def test_change_of_the_result_is_refused_and_named(tmp_path, change):
    folder = named(tmp_path)
    with pytest.raises(ConfigError, match=rf"{next(iter(change))}.*resume\.allow="):
        open_run(tmp_path, "x", but(**change), resume=folder)
    with open_run(tmp_path, "x", CONFIG) as run:  # and neither is locked nor changed
        assert str(run.folder) == folder


@pytest.mark.parametrize("allow", [["lr"], ["l*"], ["lr", "data"]])
def test_named_change_is_allowed(tmp_path, allow):
    with open_run(tmp_path, "x", but(lr=2.0), named(tmp_path), allow) as run:
        run.accept()
        assert run.config()["lr"] == 2.0


def test_change_below_an_allowed_group_is_allowed(tmp_path):
    changed = but(data={**CONFIG["data"], "frames": 3})
    with open_run(tmp_path, "x", changed, named(tmp_path), ["data"]) as run:
        run.accept()
        assert run.config()["data"]["frames"] == 3


def test_run_that_is_in_use_cannot_be_named(tmp_path):
    with (
        open_run(tmp_path, "x", CONFIG) as run,
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on host .* is running in it"),
    ):
        open_run(tmp_path, "x", CONFIG, resume=str(run.folder))


def test_folder_without_a_run_cannot_be_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        open_run(tmp_path, "x", CONFIG, resume=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --- content --------------------------------------------------------------------------------------


def test_config_is_read_as_it_was_given(tmp_path):
    given = {
        "lr": 1e-5,
        "text": "1e-5",
        "no": "no",
        "none": None,
        "list": [1, 2.5],
        "a": {"b": True},
    }
    with open_run(tmp_path, "x", given) as run:
        assert run.config() == given
        assert type(run.config()["lr"]) is float


def test_the_environment_has_versions_code_and_machine(tmp_path):
    with open_run(tmp_path, "x", CONFIG) as run:
        facts = json.loads(run.environment.read_text())
    assert facts["versions"]["torch"] and facts["python"] and facts["hardware"]["cores"] >= 1
    assert len(facts["code"].get("commit", 40 * "0")) == 40
    assert facts["argv"] == sys.argv or len(facts["argv"]) == len(sys.argv)


def test_environments_of_earlier_starts_are_kept(tmp_path):
    for device in ("a", "b", "c"):
        with open_run(tmp_path, "x", CONFIG) as run:
            run.accept()
            run.describe(device=device)
    recorded = json.loads(run.environment.read_text())
    assert recorded["device"] == "c"
    assert [e["device"] for e in recorded["earlier"]] == ["a", "b"]


def test_secrets_are_not_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    monkeypatch.setattr(
        sys, "argv", ["run.py", "x.api_key=0123456789abcdef", "y=hf_verysecretvalue"]
    )
    config = but(x={"api_key": "0123456789abcdef"}, url="https://me:pass@host/hf_verysecretvalue")
    with open_run(tmp_path, "x", config) as run:
        run.finish({"note": "hf_verysecretvalue"})
    written = "".join(p.read_text() for p in run.folder.iterdir() if p.is_file())
    for secret in ("hf_verysecretvalue", "0123456789abcdef", ":pass@"):
        assert secret not in written
    assert "api_key=***" in written


def test_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="out="):
        open_run(tmp_path / "file" / "runs", "x", CONFIG)


# --- metrics --------------------------------------------------------------------------------------


def test_last_value_of_a_step_counts_and_other_names_stay(tmp_path):
    run = Run(tmp_path)
    run.record_all([(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    run.record_all([(1, {"score": 5.0})])
    run.record_all([(2, {"loss": 0.1 + 0.2})])
    assert run.metrics() == {1: {"loss": 1.0, "score": 5.0}, 2: {"loss": 0.1 + 0.2}}


def test_line_that_a_kill_cut_off_is_passed_over_and_spoils_no_other(tmp_path):
    run = Run(tmp_path)
    run.record_all([(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    run.metrics_file.write_bytes(run.metrics_file.read_bytes()[:-9])
    later = Run(tmp_path)
    later.record_all([(2, {"loss": 3.0})])
    later.record_all([(3, {"loss": 4.0})])
    assert later.metrics() == {1: {"loss": 1.0}, 2: {"loss": 3.0}, 3: {"loss": 4.0}}


def test_steps_after_the_one_that_a_resume_starts_from_do_not_count(tmp_path):
    run = Run(tmp_path)
    run.record_all([(s, {"loss": float(s)}) for s in range(1, 6)])
    run.rewind(2)
    run.record_all([(3, {"loss": 30.0})])
    assert run.metrics() == {1: {"loss": 1.0}, 2: {"loss": 2.0}, 3: {"loss": 30.0}}


def test_run_without_metrics_has_none(tmp_path):
    assert Run(tmp_path).metrics() == {}


# --- the rest -------------------------------------------------------------------------------------


def test_typed_configuration_comes_back_from_the_folder(tmp_path):
    from sandbox.config import discovery
    from sandbox.config.root import Root
    from sandbox.runs import lookup

    discovery.setup()
    root = Root(out=str(tmp_path), recipe="mine", resume=registry.default("resume", "auto"))
    with runs.open_root(root) as run:
        assert run.folder.name.startswith("mine-")
    assert lookup.read_root(run.folder) == root


def test_files_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    """Those that it names by relative paths; from where it was started nothing is changed."""
    from sandbox.runs import lookup
    from tests.helpers import composed

    started, data = tmp_path / "started", tmp_path / "started" / "data"
    data.mkdir(parents=True)
    (started / "first.safetensors").touch()
    monkeypatch.chdir(started)
    named = ("vae=kl", "vae.weights=first.safetensors", "data=video_folder", "data.root=data")
    root = composed(*named, "init_from=lost.ckpt", "metric=clip_score", "metric.weights=./clip.pt")
    with runs.open_root(root) as run:
        folder = run.folder.resolve()
    assert lookup.read_root(folder) == root
    monkeypatch.chdir(tmp_path)
    found = lookup.read_root(folder)
    assert found.vae.weights == str(started / "first.safetensors")
    assert found.data.root == str(data)
    assert (found.init_from, found.metric.weights) == ("lost.ckpt", "./clip.pt")  # not there
    started.rename(tmp_path / "moved")  # a project as a whole
    monkeypatch.chdir(tmp_path / "moved")
    assert lookup.read_root(tmp_path / "moved" / folder.relative_to(started)) == root


def test_a_run_resumes_from_another_folder_with_paths_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "first.safetensors").touch()
    monkeypatch.chdir(tmp_path / "here")
    config = {"vae": {"weights": "first.safetensors"}}
    with open_run(tmp_path / "out", "mine", config) as run:
        pass
    monkeypatch.chdir(tmp_path)
    same = {"vae": {"weights": "here/first.safetensors"}}
    with open_run(tmp_path / "out", "mine", same, str(run.folder)) as again:
        assert again.resumed
    (tmp_path / "first.safetensors").touch()
    with pytest.raises(ConfigError, match=r"vae\.weights: was .* may change the result"):
        other = {"vae": {"weights": "./first.safetensors"}}
        open_run(tmp_path / "out", "mine", other, str(run.folder))


def test_run_folders_need_no_torch():
    code = "import sys, sandbox.runs.resume, sandbox.config.secrets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
