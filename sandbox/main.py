"""What happens between a command line and a run. Nothing here imports torch.

A single run is composed, wired and handed to its task. A multirun is composed and wired job by job first: one bad
job and nothing starts. Exit codes: 0 done, 2 wrong input, 3 data, 4 diverged, 5 storage, 75 preempted, 1 our bug.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.config import Root
from sandbox.contracts import ConfigError, PluginError, SandboxError
from sandbox.wiring import wire

WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
              "-er", "--experimental-rerun")  # fmt: skip
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass
class Line:
    """A command line, sorted: Hydra's flags with their values, and overrides in their order."""

    flags: dict[str, str | None] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def has(self, *names: str) -> bool:
        return any(n in self.flags for n in names)

    def value(self, *names: str) -> str | None:
        return next((self.flags[n] for n in names if n in self.flags), None)


def parse(argv: Sequence[str]) -> Line:
    """Sorts a command line; flags and overrides may come in any order (plain Hydra refuses `a=b -m c=d`)."""
    line, words = Line(), list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if not word.startswith("-"):
            line.overrides.append(word)
        elif flag in WITH_VALUE:
            if not has_value and not words:
                raise ConfigError(f"{flag}: a value must follow")
            line.flags[flag] = value if has_value else words.pop(0)
        elif flag in ("-i", "--info"):
            line.flags["--info"] = value or (words.pop(0) if words and words[0] in INFO else "all")
        else:
            line.flags[word] = None
    known = {"-m", "--multirun", "-r", "--resolve", "-h", "--help", "--hydra-help", "--version", "-sc", "--shell-completion",
             "--run", "--info", "--traceback", *WITH_VALUE}  # fmt: skip
    wrong = [f for f in line.flags if f not in known]
    if wrong:
        raise ConfigError(*(f"{f}: no such flag{registry.nearest(f, sorted(known))}" for f in wrong))
    return line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line and leaves with its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(argv)
    except SandboxError as e:
        _report(e)
        if "--traceback" in argv:
            raise
        code = e.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _main(argv: list[str]) -> int:
    line = parse(argv)
    config.setup(line.overrides)
    line.overrides = config.expand(line.overrides)
    if line.has("-h", "--help"):
        from sandbox.usage import usage

        print(usage(line.overrides))
        return 0
    if line.has("-c", "--cfg", "--info", "-sc", "--shell-completion", "--hydra-help", "--version"):
        return _hydra_shows(line)
    if line.has("-m", "--multirun"):
        return _multirun(line)
    run(config.compose(line.overrides, *_config_place(line)), line.overrides)
    return 0


def _config_place(line: Line) -> tuple[str, str | None]:
    return line.value("-cn", "--config-name") or "config", line.value("-cd", "--config-dir")


def run(cfg: Any, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """One job: typed, wired, and handed to its task; returns what the task returns."""
    root = config.to_root(cfg)
    if root.task is not None and root.task.uses_run():
        from sandbox.earlier import find_run, read_root

        folder = find_run(root.out, root.task.run)
        root = config.overridden(read_root(folder), root, overrides)
        root = replace(root, task=replace(root.task, run=str(folder)))
    return perform(root, overrides, group)


def perform(root: Root, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """Hands a configuration to its task, wired where the task works on a system."""
    if root.task is None:
        raise ConfigError(f"task=null: want one of {config.options('task')}")
    if root.task.needs_torch:
        return registry.create(root.task)(wire(root), list(overrides), group)
    problems = [f"task.{p}" for p in root.task.problems()]
    if problems:
        raise ConfigError(*problems)
    return registry.create(root.task)(root)


# --- multirun -----------------------------------------------------------------------------------------------


def _multirun(line: Line) -> int:
    """Checks every job, then lets Hydra's sweeper and launcher run them."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra

    name, config_dir = _config_place(line)
    problems: list[str] = []
    for i, job in enumerate(jobs(line.overrides)):
        try:
            check(config.compose(job, name, config_dir), job)
        except (ConfigError, PluginError) as e:
            problems += [f"job {i} ({' '.join(job)}): {p}" for p in e.args if e.exit_code == 2]
    if problems:
        raise ConfigError(*problems, "no job was started")
    overrides = [*line.overrides, *config.search_path(line.overrides, config_dir)]
    folder = Path(config.compose([o for o in line.overrides if not _sweeps(o)], name, config_dir).hydra.sweep.dir)
    overrides.append(f"hydra.sweep.dir='{folder}'")
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("sandbox", create_config_search_path(str(config.CONF)))
    try:
        hydra.multirun(name, job_of(folder), overrides, with_log_configuration=False)
    except Exception as e:  # a job's own error, or the launcher's: said below, job by job
        if not list(folder.glob("job-*.json")):
            raise
        if "--traceback" in line.flags:
            print(repr(e), file=sys.stderr)
    finally:
        GlobalHydra.instance().clear()
    return _sum_up(folder)


def jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The override lists of a multirun's jobs, as Hydra's basic sweeper makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides([*overrides])
        for batch in BasicSweeper.split_arguments(parsed, None):
            yield from (list(job) for job in batch)
    except HydraException as e:
        raise config._translate(e, overrides) from e


def check(cfg: Any, overrides: Sequence[str]) -> None:
    """Raises every configuration error of a job, as starting it would."""
    root = config.to_root(cfg)
    if root.task is not None and not root.task.uses_run():
        wire(root)


def _sweeps(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override).is_sweep_override()


class job_of:
    """The task function of a multirun: runs a job, notes its outcome in the sweep's folder, and raises its error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = list(hydra.overrides.task)
        outcome: dict[str, Any] = {"number": int(hydra.job.num), "overrides": overrides, "exit_code": 1}
        try:
            config.setup(overrides)
            print(f"job {hydra.job.num}: {' '.join(overrides)}", flush=True)
            result = run(cfg, overrides, group=self.folder.name)
            outcome |= {"exit_code": 0, "result": result if isinstance(result, dict) else None}
            return result.get("objective") if isinstance(result, dict) else None
        except SandboxError as e:
            outcome |= {"exit_code": e.exit_code, "error": str(e)}
            raise
        except Exception as e:  # noted for the summary and raised again
            outcome |= {"error": f"{type(e).__name__}: {e}"}
            raise
        finally:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"job-{hydra.job.num}.json").write_text(json.dumps(outcome, indent=2, default=str))


def _sum_up(folder: Path) -> int:
    """Prints one line a job; the exit code is that of the first job that failed."""
    outcomes = sorted((json.loads(p.read_text()) for p in folder.glob("job-*.json")), key=lambda o: o["number"])
    for o in outcomes:
        said = "done" if o["exit_code"] == 0 else f"exit code {o['exit_code']}: {o.get('error')}"
        print(f"job {o['number']} ({' '.join(o['overrides'])}): {said}")
    print(f"sweep folder: {folder}")
    return next((o["exit_code"] for o in outcomes if o["exit_code"]), 0)


# --- showing ------------------------------------------------------------------------------------------------


def _hydra_shows(line: Line) -> int:
    """--cfg, --info, shell completion: Hydra answers, after we have said what is wrong with the configuration."""
    import hydra

    if line.has("-c", "--cfg", "--info"):
        config.compose(line.overrides, *_config_place(line))
    words = [w for flag, value in line.flags.items() for w in ((flag, value) if value else (flag,))]
    config_dir = _config_place(line)[1]
    sys.argv = [sys.argv[0], *words, *line.overrides, *config.search_path(line.overrides, config_dir)]
    hydra.main(str(config.CONF), "config", version_base="1.3")(lambda cfg: None)()
    return 0


def _report(error: SandboxError) -> None:
    """One message, without a traceback unless asked for (--traceback)."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
    else:
        print(f"{len(problems)} errors:", *(f"  - {p}" for p in problems), sep="\n", file=sys.stderr)
    if os.environ.get("SANDBOX_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
