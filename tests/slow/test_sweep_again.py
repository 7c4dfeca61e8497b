"""A real multirun and its repetition: report, skipped jobs, and runs compared and replayed."""

from __future__ import annotations

import json
import shutil

import pytest

from sandbox.cli.main import _main
from sandbox.contracts import ConfigError, SandboxError
from sandbox.distributed.supervisor import in_this_process
from sandbox.runs.diff import compare_runs
from tests.command import SMALL

pytestmark = pytest.mark.slow


QUICK = ("steps=3", "metric=digits", "metric.reference=200")  # seconds of each run


def command(out, *words):
    given = {w.partition("=")[0] for w in words}
    small = [w for w in SMALL if w.partition("=")[0] not in given]
    with in_this_process():
        return _main([*small, *QUICK, f"out={out}", f"cache={out}/cache", *words])


def folders(out):
    return sorted(p.parent for p in out.glob("*/config.yaml"))


def newest(out):
    return max((out / "sweeps").iterdir(), key=lambda p: p.name)


def outcomes(out):
    return [json.loads(p.read_text()) for p in sorted(newest(out).glob("job-*.json"))]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two learning rates and three seeds, all finished."""
    out = tmp_path_factory.mktemp("sweep")
    assert command(out, "-m", "lr=1e-3,2e-3", "seeds=3") == 0
    return out


def test_a_multirun_ends_in_a_report_of_its_runs(out):
    found = json.loads((newest(out) / "report" / "report.json").read_text())
    assert found["columns"] == ["lr"]
    assert [v["settings"] for v in found["variants"]] == [{"lr": "0.001"}, {"lr": "0.002"}]
    assert [sorted(v["runs"]) for v in found["variants"]] == [["0", "1", "2"]] * 2
    assert {"loss", "digit"} <= set(found["metrics"])
    for variant in found["variants"]:
        assert variant["numbers"]["loss"]["low"] < variant["numbers"]["loss"]["high"]
        assert variant["costs"]["trained"] > 1000
    page = (newest(out) / "report" / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2  # a sample of each variant


def test_a_repeated_multirun_runs_only_the_missing_jobs(out, tmp_path, capsys):
    shutil.copytree(out, tmp_path / "out")
    out = tmp_path / "out"
    first, second = folders(out)[:2]
    (first / "result.json").unlink()  # unfinished
    shutil.rmtree(second)  # never started
    before = {p: (p / "result.json").stat().st_mtime_ns for p in folders(out)[1:]}
    assert command(out, "-m", "lr=1e-3,2e-3", "seeds=3") == 0
    done = outcomes(out)
    assert sorted(bool(o["done_before"]) for o in done) == [False, False, True, True, True, True]
    assert all(o["result"]["objective"] is not None for o in done)
    assert len(folders(out)) == 6 and (second / "result.json").is_file()
    after = {p: (p / "result.json").stat().st_mtime_ns for p in before}
    assert after == before
    assert capsys.readouterr().out.count("): done before") == 4


FIRST_STAGE = (
    "task=train_vae", "vae=kl", "vae.ch=8", "vae.ch_mult=[1,1]", "steps=2", "logger=null",
    "data.clips_per_epoch=8", "clips=2", "shown=1", "task.batch_size=2", "ema=none",
    "trainer.threads=1", "vae.weights=null",
)  # fmt: skip


def test_finished_first_stages_are_not_trained_again(tmp_path):
    words = [*FIRST_STAGE, f"out={tmp_path}", "-m", "lr=1e-3,2e-3"]
    with in_this_process():
        assert _main(words) == 0
        both = {p: (p / "result.json").stat().st_mtime_ns for p in folders(tmp_path)}
        assert len(both) == 2
        words[-1] += ",4e-3"
        assert _main(words) == 0
    assert sorted(bool(o["done_before"]) for o in outcomes(tmp_path)) == [False, True, True]
    assert len(folders(tmp_path)) == 3
    assert both == {p: (p / "result.json").stat().st_mtime_ns for p in both}


def test_with_resume_never_a_job_is_repeated(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    assert command(tmp_path / "out", "-m", "lr=1e-3", "seed=0", "resume=never") == 0
    assert len(folders(tmp_path / "out")) == 7


def test_runs_are_compared_by_settings_steps_and_weights(out):
    by_seed = {p: json.loads((p / "result.json").read_text())["loss"] for p in folders(out)}
    a, b = [*by_seed][:2]
    run_diff = compare_runs(a, b)
    assert run_diff.differences["settings"] and not run_diff.differences["data"]
    assert run_diff.differences["numbers"][0].startswith("step 1 is the first that differs: ")
    assert "weights.safetensors: differ" in run_diff.differences["weights"]
    assert "settings\n" in str(run_diff) and "the same: " in str(run_diff)
    assert compare_runs(a, a).same_result


def test_a_replay_is_bit_identical_and_reports_it(out, tmp_path, capsys):
    run = folders(out)[0]
    with in_this_process():
        words = [f"out={tmp_path}", f"cache={out}/cache", "logger=null"]
        assert _main(["task=replay", f"run={run}", *words]) == 0
    said = capsys.readouterr().out
    assert "bit for bit" in said
    (again,) = folders(tmp_path)
    assert compare_runs(run, again).same_result

    text = (run / "metrics.jsonl").read_text()
    copy = tmp_path / "other" / run.name
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text(text.replace('"step": 2, "loss": ', '"step": 2, "loss": 1'))
    with in_this_process(), pytest.raises(SandboxError, match="damaged or edited"):
        _main(["task=replay", f"run={copy}", *words])
    (copy / "environment.json").unlink()  # it has the hashes of the other files
    with in_this_process(), pytest.raises(SandboxError, match="is not equal to it"):
        _main(["task=replay", f"run={copy}", *words])
    assert "step 2 is the first that differs: loss" in capsys.readouterr().out


def test_folders_that_are_no_finished_runs_are_refused(out, tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        _main(["task=replay", f"run={tmp_path}"])
    with pytest.raises(ConfigError, match="want two run folders"):
        _main(["task=diff", f"runs=[{out}]"])
