"""What happens between a command line and a run. Nothing here imports torch.

A single run is composed, wired and handed to its task. A multirun is composed and wired job by job
first: one bad job and nothing starts. Exit codes: 0 done, 2 wrong input, 3 data, 4 diverged,
5 storage, 75 preempted, 130 interrupted, 1 our bug, which alone shows a traceback unasked.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.config import Root
from sandbox.contracts import ConfigError, PluginError, Preempted, SandboxError
from sandbox.secrets import mask_text
from sandbox.wiring import Wiring, wire

SHOW = {  # flags that show something, with what may follow them
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
SHORT = {"-c": "--cfg", "-i": "--info", "-m": "--multirun", "-h": "--help", "-p": "--package",
         "-cn": "--config-name", "-cd": "--config-dir", "-sc": "--shell-completion"}  # fmt: skip
WITH_VALUE = ("--cfg", "--package", "--config-name", "--config-dir")
PLAIN = ("--multirun", "--help", "--resolve", "--shell-completion", "--version", "--traceback")
KNOWN = (*PLAIN, *WITH_VALUE, "--info", *SHORT)


@dataclass
class Line:
    """A command line, sorted: flags by their long names with their values, overrides in order."""

    flags: dict[str, str | None] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @property
    def config_name(self) -> str:
        return self.flags.get("--config-name") or "config"

    @property
    def config_dir(self) -> str | None:
        return self.flags.get("--config-dir")

    def compose(self, overrides: Sequence[str]) -> Any:
        return config.compose(overrides, self.config_name, self.config_dir)


def parse(argv: Sequence[str]) -> Line:
    """Sorts a command line; flags and overrides come in any order (plain Hydra refuses `a=b -m`).

    Raises ConfigError for flags that are not there and for settings that are given twice.
    """
    line, words, problems = Line(), list(argv), []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            line.overrides.append(word)
            continue
        said, has_value, value = word.partition("=")
        flag = SHORT.get(said, said)
        if flag not in KNOWN:
            near = registry.nearest(said, KNOWN) if len(said) > 3 else "; --help lists them"
            problems.append(f"{said}: no such flag{near}")
            continue
        if flag == "--info" and not has_value:
            value = words.pop(0) if words and words[0] in SHOW[flag] else "all"
        elif flag in WITH_VALUE and not has_value:
            if not words:
                problems.append(f"{said}: a value must follow")
                continue
            value = words.pop(0)
        if flag in SHOW and value not in SHOW[flag]:
            problems.append(f"{said} {value}: want one of {', '.join(SHOW[flag])}")
        line.flags[flag] = value or None
    problems += _twice(line.overrides)
    if problems:
        raise ConfigError(*problems)
    return line


def _twice(overrides: Sequence[str]) -> list[str]:
    given: dict[str, list[str]] = {}
    for override in overrides:
        given.setdefault(override.partition("=")[0].lstrip("+~"), []).append(override)
    return [f"{' '.join(all_)}: {k} is given twice; keep one" for k, all_ in given.items() if len(all_) > 1]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line and leaves with its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(argv)
    except SandboxError as e:
        _report(e)
        if "--traceback" in argv:
            traceback.print_exception(e)
        code = e.exit_code
    except BrokenPipeError:  # the reader of a pipe left: `python run.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except Exception as e:  # not foreseen: shown whole, so that it can be mended
        traceback.print_exception(e)
        print(f"error: {BUG}", file=sys.stderr)
        code = 1
    sys.exit(code)


BUG = "this is a bug of the sandbox and not of your settings; please report it with the lines above"


def _main(argv: list[str]) -> int:
    line = parse(argv)
    config.setup(line.overrides)
    line.overrides = config.expand(line.overrides)
    if "--help" in line.flags:
        from sandbox.usage import usage

        print(usage(line.overrides, line.config_dir))
        return 0
    if line.flags.keys() & {*SHOW, "--shell-completion", "--version"}:
        return _hydra_shows(line)
    from sandbox.earlier import choices

    earlier = choices(line.overrides)
    if "--multirun" in line.flags:
        return _multirun(line, earlier)
    run(line.compose([*earlier, *line.overrides]), line.overrides)
    return 0


def run(cfg: Any, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """One job: typed, wired, and handed to its task; returns what the task returns."""
    return perform(settled(config.to_root(cfg), overrides), overrides, group)


def settled(root: Root, overrides: Sequence[str]) -> Root:
    """`root`; where its task works on an earlier run, that run's configuration with `overrides`."""
    if root.task is None or not root.task.uses_run():
        return root
    from sandbox.earlier import find_run, read_root

    folder = find_run(root.out, root.task.run)
    root = config.overridden(read_root(folder), root, overrides)
    return replace(root, task=replace(root.task, run=str(folder)))


def perform(root: Root, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """Hands a configuration to its task, wired where the task works on a system."""
    wiring = checked(root)
    # Read by OpenMP when torch is imported. Threads that spin while they wait take 3 to 15 times as long on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    task = registry.create(root.task)
    return task(root) if wiring is None else task(wiring, list(overrides), group)


def checked(root: Root) -> Wiring | None:
    """`root`, wired where its task works on a system; the files that it names are there.

    Raises ConfigError with every problem.
    """
    if root.task is None:
        raise ConfigError(f"task=null: want one of {', '.join(config.options('task'))}")
    if not root.task.needs_torch:
        problems = [f"task.{p}" for p in root.task.problems()]
        if problems:
            raise ConfigError(*problems)
        return None
    named = {"init_from": root.init_from}
    if not root.task.uses_run():
        named["vae.weights"] = getattr(root.vae, "weights", None)
    absent = [
        f"{name}={file}: no such file or folder"
        for name, file in named.items()
        if file not in (None, "auto", "None") and not Path(file).exists()
    ]
    try:
        wiring = wire(root)
    except ConfigError as e:
        raise ConfigError(*e.problems, *absent) from e
    if absent:
        raise ConfigError(*absent)
    return wiring


# --- multirun --------------------------------------------------------------------------------


def _multirun(line: Line, earlier: list[str]) -> int:
    """Checks every job, then lets Hydra's sweeper and launcher run them."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    from sandbox.files import storing

    planned = jobs(line.overrides)
    _check_all(line, earlier, planned)
    fixed = [o for o in line.overrides if not _sweeps(o)]
    folder = Path(line.compose([*earlier, *fixed]).hydra.sweep.dir)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    overrides = [*earlier, *line.overrides, *config.search_path(line.overrides, line.config_dir)]
    overrides = [o for o in overrides if not o.startswith("hydra.sweep.dir=")]
    overrides.append(f"hydra.sweep.dir='{folder}'")
    job = Job(folder, tuple(earlier), "--traceback" in line.flags)
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("sandbox", create_config_search_path(str(config.CONF)))
    try:
        with redirect_stderr(_WithoutOverrides(sys.stderr)):  # type: ignore[type-var]
            hydra.multirun(line.config_name, job, overrides, with_log_configuration=False)
    except Exception as e:  # a job's own, said below by that job; or the launcher's
        outcomes = list(folder.glob("job-*.json"))
        if not outcomes or all(json.loads(p.read_text())["exit_code"] == 0 for p in outcomes):
            raise
        if "--traceback" in line.flags:
            traceback.print_exception(e)
    finally:
        GlobalHydra.instance().clear()
        (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's; it may hold secrets
    return _sum_up(folder, len(planned or ()))


class _WithoutOverrides:
    """stderr without Hydra's line that repeats the overrides of a failed job, secrets included."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _check_all(line: Line, earlier: list[str], planned: list[list[str]] | None) -> None:
    """Raises ConfigError with the problems of all jobs, each with the jobs that have it."""
    if planned is None:
        planned = [[o for o in line.overrides if not _sweeps(o)]]
    found: dict[str, list[int]] = {}
    for i, job in enumerate(planned):
        try:
            check(line.compose([*earlier, *job]), job)
        except (ConfigError, PluginError) as e:
            for problem in e.problems if isinstance(e, ConfigError) else e.args:
                found.setdefault(problem, []).append(i)
    if not found:
        return
    every = list(range(len(planned)))
    problems = [p if jobs == every else f"{_numbers(jobs)}: {p}" for p, jobs in found.items()]
    error = ConfigError(*problems)
    error.add_note(f"none of the {len(planned)} jobs was started")
    raise error


def _numbers(jobs: list[int]) -> str:
    """"job 3" or "jobs 0, 2 and 5 more"."""
    shown = ", ".join(map(str, jobs[:5]))
    more = f" and {len(jobs) - 5} more" if len(jobs) > 5 else ""
    return f"job{'s' * (len(jobs) > 1)} {shown}{more}"


def jobs(overrides: Sequence[str]) -> list[list[str]] | None:
    """The overrides of a multirun's jobs; None where the sweeper decides them as it goes."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    sweeper = next((o.partition("=")[2] for o in overrides if o.startswith("hydra/sweeper=")), "basic")
    if sweeper != "basic":
        return None
    try:
        parsed = OverridesParser.create().parse_overrides([*overrides])
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as e:
        from sandbox.mistakes import explain_words

        raise explain_words(e, overrides) from e


def check(cfg: Any, overrides: Sequence[str]) -> None:
    """Raises every configuration error of a job, as starting it would."""
    checked(settled(config.to_root(cfg), overrides))


def _sweeps(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


@dataclass
class Job:
    """The task function of a multirun: runs a job, notes its outcome in the sweep's folder, and
    raises its error. It never exits: that would take the other jobs along.

    `earlier`: overrides that were put in front and are not the user's.
    """

    folder: Path
    earlier: tuple[str, ...] = ()
    traceback: bool = False
    preempted: bool = False

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = [o for o in hydra.overrides.task if o not in self.earlier]
        said = mask_text(" ".join(overrides))
        outcome: dict[str, Any] = {"number": int(hydra.job.num), "overrides": said, "exit_code": 1}
        try:
            if self.preempted:
                raise Preempted("not started: the multirun was asked to stop")
            config.setup(overrides)
            print(f"job {hydra.job.num}: {said}", flush=True)
            result = run(cfg, overrides, group=self.folder.name)
            outcome |= {"exit_code": 0, "result": result if isinstance(result, dict) else None}
            return result.get("objective") if isinstance(result, dict) else None
        except SandboxError as e:
            self.preempted |= isinstance(e, Preempted)
            outcome |= {"exit_code": e.exit_code, "error": mask_text(str(e))}
            _report(e, f"job {hydra.job.num}: ")
            if self.traceback:
                traceback.print_exception(e)
            raise
        except SystemExit as e:
            outcome |= {"error": f"it left with exit code {e.code}"}
            raise RuntimeError(f"a job tried to leave with exit code {e.code}") from e
        except Exception as e:  # a bug: shown whole, noted and raised again
            outcome |= {"error": mask_text(f"{type(e).__name__}: {e}")}
            traceback.print_exception(e)
            raise
        finally:
            path = self.folder / f"job-{hydra.job.num}.json"
            path.write_text(json.dumps(outcome, indent=2, default=str))


def _sum_up(folder: Path, planned: int) -> int:
    """Prints one line a job; the exit code is that of the first job that failed."""
    outcomes = {o["number"]: o for p in folder.glob("job-*.json") if (o := json.loads(p.read_text()))}
    print()
    for i in range(max([planned, *(n + 1 for n in outcomes)])):
        o = outcomes.setdefault(i, {"overrides": "", "exit_code": 1, "error": "it left no word"})
        text = str(o.get("error", "")).partition("\n")[0]
        said = "done" if o["exit_code"] == 0 else f"failed (exit code {o['exit_code']}): {text}"
        print(f"job {i} ({o['overrides']}): {said}")
    print(f"multirun  {folder}", flush=True)
    return next((o["exit_code"] for _, o in sorted(outcomes.items()) if o["exit_code"]), 0)


# --- showing ---------------------------------------------------------------------------------


def _hydra_shows(line: Line) -> int:
    """--cfg, --info, shell completion: Hydra answers, once the configuration is found sound."""
    import hydra
    from omegaconf import OmegaConf

    if line.flags.keys() & SHOW.keys():
        cfg, part = line.compose(line.overrides), line.flags.get("--package")
        if part and OmegaConf.select(cfg, part) is None:
            raise ConfigError(f"--package {part}: there is no such part of the configuration")
    if "--shell-completion" in line.flags:
        _check_completion(line.overrides)
        config.setup(os.environ.get("COMP_LINE", "").split())
    flags = {k: v for k, v in line.flags.items() if k not in ("--traceback", "--multirun")}
    words = [w for flag, value in flags.items() for w in ((flag, value) if value else (flag,))]
    path = config.search_path(line.overrides, line.config_dir)
    sys.argv = [sys.argv[0], *words, *line.overrides, *path]
    hydra.main(str(config.CONF), "config", version_base="1.3")(lambda cfg: None)()
    return 0


def _check_completion(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra's shell completion does not know."""
    verb, _, shell = overrides[0].partition("=") if len(overrides) == 1 else ("", "", "")
    if verb not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise ConfigError("--shell-completion: want install=bash, or zsh or fish")
    if verb == "query" and "COMP_LINE" not in os.environ:
        raise ConfigError(f"--shell-completion {overrides[0]}: only a shell asks this (COMP_LINE)")


def _report(error: SandboxError, before: str = "") -> None:
    """One message on stderr, without secrets."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    if len(problems) == 1:
        text = f"{before}error: {problems[0]}"
    else:
        text = "\n".join([f"{before}{len(problems)} errors:", *(f"  - {p}" for p in problems)])
    text = "\n".join([text, *getattr(error, "__notes__", [])])
    print(mask_text(text), file=sys.stderr, flush=True)
