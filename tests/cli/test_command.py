"""The command line: any order of words, quick answers, multiruns, and exit codes."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.cli.command_line import parse
from sandbox.cli.main import _main, main
from sandbox.cli.multirun import jobs
from sandbox.config import discovery, registry
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import GROUPS
from sandbox.contracts import ConfigError

HOME = CHECKOUT
PROBE = '''
"""A task that notes its settings and ends as it is told."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from sandbox.contracts import DataError, Diverged, Preempted, StorageError, TaskConfig, in_range
from sandbox.registry import register

ERRORS = {3: DataError, 4: Diverged, 5: StorageError, 75: Preempted}

@register("task", "probe")
class Probe:
    """Notes its settings and ends as it is told."""

    @dataclass
    class Config(TaskConfig):
        needs_torch: ClassVar[bool] = False
        code: int = 0
        note: str = "notes"

        def problems(self):
            yield from in_range("code", self.code, -2, 99)

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, root):
        folder = Path(self.cfg.note)
        folder.mkdir(exist_ok=True)
        (folder / f"{root.lr}-{root.backbone.plugin.split('/')[1]}-{self.cfg.code}").touch()
        if self.cfg.code in ERRORS:
            raise ERRORS[self.cfg.code]("as it was told")
        if self.cfg.code == -1:
            raise RuntimeError("a bug")
        if self.cfg.code == -2:
            raise SystemExit(9)
        return {"objective": float(root.lr)}
'''


@pytest.fixture
def here(plugin_folder, tmp_path, monkeypatch) -> Path:
    """An empty working folder, with task=probe."""
    (plugin_folder / "task").mkdir()
    (plugin_folder / "task" / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notes(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "notes").glob("*"))


def run(*words: str, code: int | None = 0, **env: str) -> subprocess.CompletedProcess:
    """`python run.py WORDS` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HOME / "run.py"), *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env}, check=False,
    )  # fmt: skip
    if code is not None:
        assert done.returncode == code, done.stderr[-2000:]
    return done


# --- words in any order ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 3, 5])
def test_a_multirun_may_be_asked_for_anywhere(here, order):
    words = ["backbone=dit", "vae=magvit", "lr=1e-5,2e-6", "task=probe", "-cn=config"]
    flag = "-m" if order % 2 else "--multirun"
    assert _main([*words[:order], flag, *words[order:]]) == 0
    assert notes(here) == ["1e-05-dit-0", "2e-06-dit-0"]


def test_flags_and_their_values_may_come_in_any_order():
    parts = [["-m"], ["-cn", "other"], ["--config-dir=dir"], ["a=b"], ["--info"], ["c=d"]]
    for order in itertools.permutations(parts):
        line = parse([word for part in order for word in part])
        assert line.flags == {"--multirun": None, "--config-name": "other", "--config-dir": "dir",
                              "--info": "all"}  # fmt: skip
        assert sorted(line.overrides) == ["a=b", "c=d"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--multirum"], "--multirum: no such flag; did you mean '--multirun'?"),
        (["-x"], "-x: no such flag; --help lists them"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun: no such flag"),
        (["-cd"], "-cd: needs a value"),
        (["--cfg", "jobb"], "--cfg jobb: want one of job, hydra, all"),
        (["lr=1", "-m", "lr=2"], "lr=1 lr=2: lr is given twice; keep one"),
        (["logger.mode=a", "+logger.mode=b"], "logger.mode is given twice"),
        (["vae=pca", "--cfg", "job", "vae=kl"], "vae is given twice"),
    ],
)
def test_a_line_that_cannot_be_sorted_says_why(words, problem):
    with pytest.raises(ConfigError) as e:
        parse(words)
    assert problem in str(e.value)


def test_settings_of_the_task_need_no_prefix(here):
    assert _main(["task=probe", "note=elsewhere", "lr=3"]) == 0
    assert (here / "elsewhere" / "3.0-dit-0").is_file()


# --- quick answers --------------------------------------------------------------------------------

HEAVY = ("torch", "lightning", "wandb", "torchvision", "numpy", "sklearn", "kernels")
COUNTED = """
import contextlib, io, json, os, sys
sys.path.insert(0, {home!r})
from sandbox.main import main
for words, completed in {lines!r}:
    os.environ["COMP_LINE"] = completed
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(words)
        except SystemExit as e:
            code = e.code
    plugins = {{m for m in sys.modules if m.startswith("plugins.") and "_configs" not in m}}
    print(json.dumps([code, said.getvalue(), sorted(plugins | {heavy!r} & sys.modules.keys())]))
"""


def counted(lines: list[tuple[list[str], str]], folder: Path) -> list[tuple[int, str, list[str]]]:
    """(exit code, text, heavy modules) of command lines, one after another in a fresh process."""
    code = COUNTED.format(home=str(HOME), lines=lines, heavy=set(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_needs_no_training_answers_without_heavy_imports(tmp_path):
    lines = [
        ("--help", 0, "conditioning    classes, dynamicrafter"),
        ("--help vae=pca", 0, "vae.components=32"),
        ("--cfg job", 0, "plugin: backbone/dit"),
        ("vae=kl --cfg job --package vae --resolve", 0, "ch_mult:"),
        ("--info defaults", 0, "backbone/dit"),
        ("--version", 0, "Hydra"),
        ("-sc install=bash", 0, "hydra_bash_completion"),
        ("task=plugins", 0, "vae/pca.py"),
        ("task=plugins to=reference", 0, "pages to reference"),
        ("task=sample", 2, "task.run=null: no finished run"),
        ("backbone.widht=3", 2, "did you mean 'width'?"),
        ("data.height=18", 2, "data.height=18"),
        ("-m lr=1e-5,abc", 2, "job 1: lr=abc: want a number or null"),
        ("-m lr=1e-5,2e-6 task=plugins", 0, "job 1 (lr=2e-06 task=plugins): done"),
    ]
    found = counted([(words.split(), "") for words, _, _ in lines], tmp_path)
    assert [(code, heavy) for code, _, heavy in found] == [(code, []) for _, code, _ in lines]
    for (_, text, _), (words, _, says) in zip(found, lines, strict=True):
        assert says in text, words


def test_a_shell_completes_names(tmp_path):
    lines = {
        "python run.py backbone=di": "backbone=dit",
        "python run.py vae.pa": "vae.patch=",
        "python run.py vae=kl sam": "sampler.",
        "python run.py experiment=": "experiment=digits_long",
    }
    found = counted([(["-sc", "query=bash"], typed) for typed in lines], tmp_path)
    for (code, text, heavy), offered in zip(found, lines.values(), strict=True):
        assert (code, heavy) == (0, []) and offered in text


def test_a_shell_completes_plugins_of_the_folder_on_its_line(here, plugin_folder, monkeypatch):
    typed = f"python run.py plugins_path={plugin_folder} task=pro"
    monkeypatch.delenv("SANDBOX_PLUGINS")
    ((_, text, _),) = counted([(["-sc", "query=bash"], typed)], here)
    assert "task=probe" in text


@pytest.mark.parametrize("words", [["-sc"], ["-sc", "install=word"], ["-sc", "query=bash"]])
def test_a_wrong_request_for_completion_is_said(words):
    with pytest.raises(ConfigError, match="--shell-completion"):
        _main(words)


def test_help_lists_every_group_and_plugin_on_a_screen_and_a_half(capsys):
    _main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 100
    for group in GROUPS:
        assert re.search(rf"^{group} +\w", text, re.MULTILINE), group
        assert all(re.search(rf"\b{p.name}\b", text) for p in registry.plugins(group)), group


@pytest.mark.parametrize("group", [*GROUPS, "experiment"])
def test_help_of_a_group_describes_every_option(group, capsys):
    _main(["--help", group])
    text = capsys.readouterr().out
    for option in discovery.options(group):
        assert re.search(rf"^  {option}\b.*\w", text, re.MULTILINE), option


def test_help_of_an_unknown_group_names_the_nearest():
    with pytest.raises(ConfigError, match="--help bakbone: no such group; did you mean 'backbone'"):
        _main(["--help", "bakbone"])


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3, 4, 5, 75])
def test_the_exit_code_says_what_kind_of_error_it_was(here, capsys, code):
    with pytest.raises(SystemExit) as e:
        main(["task=probe", f"code={code}", "lr=1"])
    assert e.value.code == code
    assert capsys.readouterr().err == ("error: as it was told\n" if code else "")


def test_an_error_of_the_user_has_no_traceback_unless_asked_for(here, capsys):
    for words, shown in ((["lr=abc"], False), (["lr=abc", "--traceback"], True)):
        with pytest.raises(SystemExit) as e:
            main(words)
        assert e.value.code == 2
        assert ("Traceback" in capsys.readouterr().err) is shown


def test_a_bug_shows_its_traceback_and_says_that_it_is_one(here, capsys):
    with pytest.raises(SystemExit) as e:
        main(["task=probe", "code=-1"])
    assert e.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: a bug" in said
    assert "error: task=probe: " in said.splitlines()[-1]  # of a plugin
    with pytest.raises(SystemExit) as e:
        main([None])  # type: ignore[list-item]
    assert e.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "this is a bug of the sandbox" in said.splitlines()[-1]


def test_secrets_of_the_command_line_are_not_repeated(here, capsys):
    for words in (
        ["logger.api_key=0123456789abcdef"],
        ["task=probe", "note.api_key=0123456789abcdef", "-m"],
    ):
        with pytest.raises(SystemExit):
            main(words)
    said = capsys.readouterr()
    assert "0123456789abcdef" not in said.err + said.out


# --- multiruns ------------------------------------------------------------------------------------


def test_the_jobs_after_a_failed_one_still_run_and_the_first_failure_decides(here, capsys):
    assert _main(["-m", "task=probe", "code=0,4,3,0", "lr=1"]) == 4
    assert notes(here) == [f"1.0-dit-{c}" for c in (0, 3, 4)]
    said = capsys.readouterr().out
    assert "job 1 (task=probe task.code=4 lr=1): failed (exit code 4): as it was told" in said
    assert "job 3 (task=probe task.code=0 lr=1): done" in said


def test_a_sweep_leaves_an_outcome_for_each_job(here):
    _main(["-m", "task=probe", "code=0,4", "lr=1"])
    (folder,) = (here / "outputs" / "sweeps").iterdir()
    found = [json.loads((folder / f"job-{i}.json").read_text()) for i in range(2)]
    assert [o["exit_code"] for o in found] == [0, 4]
    assert found[0]["result"] == {"objective": 1.0}
    assert found[1]["error"] == "as it was told"
    assert sorted(p.name for p in folder.iterdir()) == ["job-0.json", "job-1.json"]


def test_a_job_that_exits_takes_no_other_along(here, capsys):
    assert _main(["-m", "task=probe", "code=-2,0", "lr=1"]) == 1
    assert notes(here) == ["1.0-dit--2", "1.0-dit-0"]
    assert "raised SystemExit: 9" in capsys.readouterr().out


def test_a_bug_in_a_job_is_shown_and_the_others_run(here, capsys):
    assert _main(["-m", "task=probe", "code=-1,0", "lr=1"]) == 1
    assert notes(here) == ["1.0-dit--1", "1.0-dit-0"]
    assert "RuntimeError: a bug" in capsys.readouterr().err


def test_a_multirun_may_leave_a_group_empty_in_some_jobs():
    assert jobs(["logger=null,csv", "lr=1"]) == [["~logger", "lr=1"], ["logger=csv", "lr=1"]]


def test_a_multirun_that_is_asked_to_stop_starts_no_further_job(here, capsys):
    assert _main(["-m", "task=probe", "code=75,0", "lr=1"]) == 75
    assert notes(here) == ["1.0-dit-75"]
    assert "not started" in capsys.readouterr().out


def test_a_multirun_with_an_invalid_job_is_refused_whole(here):
    with pytest.raises(ConfigError) as e:
        _main(["task=probe", "-m", "lr=1,abc", "backbone=dit,dti"])
    assert e.value.problems == (
        "jobs 1, 3: backbone=dti: no such option; did you mean 'dit'?",
        "jobs 2, 3: lr=abc: want a number or null",
    )
    assert e.value.__notes__ == ["none of the 4 jobs was started"]
    assert not list(here.glob("notes"))


def test_a_problem_that_all_jobs_have_is_said_once(here):
    with pytest.raises(ConfigError) as e:
        _main(["-m", "lr=1,2,3", "steps=0"])
    assert e.value.problems == ("steps=0: want >= 1",)


def test_jobs_of_a_task_that_trains_are_wired_before_the_first_starts(here):
    with pytest.raises(ConfigError, match=r"job 1: data.frames=8 does not fit vae=pca"):
        _main(["-m", "data.frames=9,8", "data.width=32"])
    assert not (here / "outputs").exists()


def test_seeds_is_a_shorthand_that_makes_a_multirun(here):
    assert _main(["task=probe", "lr=1,2", "seeds=3"]) == 0
    (folder,) = (here / "outputs" / "sweeps").iterdir()
    said = [json.loads(p.read_text())["overrides"] for p in sorted(folder.glob("job-*.json"))]
    assert len(said) == 6
    assert said[:3] == [f"task=probe lr=1 seed={seed}" for seed in range(3)]


@pytest.mark.parametrize("word", ["seeds=0", "seeds=1001", "seeds=a", "seeds=1,2"])
def test_seeds_must_be_a_number(here, word):
    with pytest.raises(ConfigError, match="want a number from 1 to 1000"):
        _main(["task=probe", word])


def test_seed_and_seeds_exclude_one_another(here):
    with pytest.raises(ConfigError, match="keep one"):
        _main(["task=probe", "seed=1", "seeds=2"])


def test_a_searching_sweeper_gets_the_mean_over_the_seeds_of_a_job(here):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=minimize"]
    assert _main(["-m", "task=probe", "lr=choice(1,2)", "seeds=2", *words]) == 0
    (folder,) = (here / "outputs" / "sweeps").iterdir()
    jobs_ = [json.loads(p.read_text()) for p in sorted(folder.glob("job-*.json"))]
    assert len(jobs_) == 2
    for job in jobs_:
        lr = float(re.search(r"lr=(\d)", job["overrides"])[1])
        assert job["result"] == {"folders": [], "scores": {}, "objective": lr}


def test_a_searching_sweeper_stops_after_a_failure_and_shows_no_overrides(here, capsys):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    assert _main(["-m", "task=probe", "code=4", "lr=choice(1,2)", *words]) == 4
    (folder,) = (here / "outputs" / "sweeps").iterdir()
    assert len(list(folder.glob("job-*.json"))) == 1  # hydra.sweeper.max_failure_rate is 0
    assert "Error executing job" not in capsys.readouterr().err


def test_a_trial_of_an_agent_runs_its_seeds_itself(here, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    assert _main(["task=probe", "lr=1", "seeds=2"]) == 0
    assert notes(here) == ["1.0-dit-0"]
    assert os.environ["WANDB_RUN_ID"] == "trial"
    assert not (here / "outputs" / "sweeps").exists()


def test_a_sweeper_that_finds_its_jobs_as_it_goes_is_left_to_it():
    discovery.setup()
    assert jobs(["hydra/sweeper=optuna", "lr=interval(1,2)"]) is None
    assert jobs(["lr=1,2", "seed=3"]) == [["lr=1", "seed=3"], ["lr=2", "seed=3"]]


def test_values_reach_the_jobs_as_they_were_typed(here):
    words = ["optimizer.betas=[0.9,0.99]", 'logger.tags=["a b",c]', 'logger.project="x, y"',
             "data.root=null", "callbacks=[samples]", "callbacks.samples.every=3", "ema.decay=1e-3",
             "+hydra.job.env_set={A: b}", "hydra.sweeper.max_batch_size=1"]  # fmt: skip
    assert _main(["-m", "task=probe", "lr=1,2", *words]) == 0
    assert notes(here) == ["1.0-dit-0", "2.0-dit-0"]


def test_a_setting_may_belong_to_a_component_that_is_swept_over(here):
    assert _main(["-m", "task=probe", "lr=1", "sampler=ddim,euler_a", "sampler.eta=0.5"]) == 0


@pytest.mark.parametrize("words", [["lr=interval(1,2)"], ["lr=1e-5,[1"], ["lr"]])
def test_a_sweep_that_cannot_be_read_is_refused(here, words):
    with pytest.raises(ConfigError):
        _main(["-m", "task=probe", *words])


def test_the_folder_of_a_multirun_is_where_the_runs_are(here):
    assert _main(["-m", "task=probe", "lr=1,2", "out=there"]) == 0
    assert len(list((here / "there" / "sweeps").glob("*/job-*.json"))) == 2
    assert _main(["-m", "task=probe", "lr=1", "hydra.sweep.dir=named"]) == 0
    assert (here / "named" / "job-0.json").is_file()
    assert _main(["-m", "task=probe", "lr=1", 'out="it\'s"']) == 0
    assert len(list((here / "it's" / "sweeps").glob("*/job-*.json"))) == 1


@pytest.mark.slow
def test_the_line_of_the_readme_trains_two_runs(tmp_path, monkeypatch):
    """Exactly as typed; what follows makes it small."""
    monkeypatch.chdir(tmp_path)
    small = ["debug=fast", "vae.weights=null", "vae.ch=8", "data.batch_size=2", "sampler.steps=1",
             "backbone.width=8", "conditioning.width=8", "task.untrained=false", "task.samples=0",
             "trainer.threads=1"]  # fmt: skip
    done = run("backbone=dit", "vae=magvit", "-m", "lr=1e-5,2e-6", *small)
    assert done.stdout.count("): done") == 2
    runs = [p.parent for p in (tmp_path / "outputs").glob("*/result.json")]
    rates = sorted(
        re.findall(r"^lr: (.*)$", (r / "config.yaml").read_text(), re.M)[0] for r in runs
    )
    assert rates == ["1.0e-05", "2.0e-06"]
