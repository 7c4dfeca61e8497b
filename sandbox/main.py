"""What happens between a command line and a run. Nothing here imports torch.

A single run is composed, wired and handed to its task. A multirun is composed and wired job by job
first: one bad job and nothing starts. Exit codes: 0 done, 2 wrong input, 3 data, 4 diverged,
5 storage, 75 preempted, 130 interrupted, 1 our bug, which alone shows a traceback unasked.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.agent import understood
from sandbox.config import Root
from sandbox.contracts import ConfigError, PluginConfig, SandboxError
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
MOST_SEEDS = 1000
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
    return [
        f"{' '.join(all_)}: {k} is given twice; keep one"
        for k, all_ in given.items()
        if len(all_) > 1
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line and leaves with its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(argv)
    except SandboxError as e:
        report(e)
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
    line.overrides = understood(line.overrides)
    config.setup(line.overrides)
    line.overrides = config.expand(line.overrides)
    seeds = take_seeds(line)
    if "--help" in line.flags:
        from sandbox.usage import usage

        print(usage(line.overrides, line.config_dir))
        return 0
    if line.flags.keys() & {*SHOW, "--shell-completion", "--version"}:
        return _hydra_shows(line)
    from sandbox.earlier import choices

    earlier = choices(line.overrides)
    if seeds is not None and "--multirun" not in line.flags and "WANDB_SWEEP_ID" in os.environ:
        from sandbox.multirun import trial

        trial(line, earlier, seeds)
        return 0
    if "--multirun" in line.flags or seeds is not None:
        from sandbox.multirun import multirun

        return multirun(line, earlier, seeds)
    run(line.compose([*earlier, *line.overrides]), line.overrides)
    return 0


def take_seeds(line: Line) -> int | None:
    """Takes the word `seeds=3` out of a command line: the same with seeds 0, 1 and 2."""
    words = [o for o in line.overrides if o.startswith("seeds=")]
    if not words:
        return None
    said = words[0].partition("=")[2]
    if not said.isdecimal() or not 1 <= int(said) <= MOST_SEEDS:
        raise ConfigError(f"{words[0]}: want a number from 1 to {MOST_SEEDS}; it is seed=0,1,...")
    other = [o for o in line.overrides if o.startswith("seed=")]
    if other:
        raise ConfigError(f"{other[0]} {words[0]}: keep one; seeds=3 is seed=0,1,2")
    line.overrides.remove(words[0])
    return int(said)


def run(cfg: Any, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """One job: typed, wired, and handed to its task; returns what the task returns."""
    return perform(settled(config.to_root(cfg), overrides), overrides, group)


def settled(root: Root, overrides: Sequence[str]) -> Root:
    """`root`; where its task works on an earlier run, that run's configuration with `overrides`.

    Raises ConfigError where a run is named and weights that it would not use.
    """
    if root.task is None or not root.task.uses_run():
        return root
    if root.task.run is None and root.init_from is not None and root.task.takes_weights():
        return root
    from sandbox.earlier import check_same_system, find_run, read_root

    folder = find_run(root.out, root.task.run)
    own = read_root(folder)
    if root.init_from is not None and own.adapter is None:
        raise ConfigError(
            f"init_from={root.init_from} and task.run={root.task.run}: a run has weights of its "
            "own; give one of them"
        )
    root = config.overridden(own, root, overrides)
    check_same_system(folder, own, root)
    return replace(root, task=replace(root.task, run=str(folder)))


def perform(root: Root, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """Hands a configuration to its task, wired where the task works on a system."""
    wiring = checked(root)
    # Read by OpenMP when torch is imported. Threads that spin while they wait take 3 to 15 times
    # as long on busy cores.
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
        parts = [x for x in root.parts() if x[0].partition(".")[0] in root.task.checks]
        problems = [f"{path}.{p}" for path, cfg in parts for p in cfg.problems()]
        problems += [p for path, cfg in parts for p in _absent(path, cfg)]
        if problems:
            raise ConfigError(*problems)
        return None
    named, reads_data = {}, root.task.reads_data()
    groups = ["task"]
    if reads_data or root.task.uses_run():
        named["init_from"] = root.init_from
        groups += ["conditioning", "adapter"]
    if reads_data or (root.task.takes_weights() and root.task.run is None):
        named["vae.weights"] = getattr(root.vae, "weights", None)
    if reads_data:
        groups += ["data", "reconstruction", "metric"]
    absent = [
        f"{name}={file}: no such file or folder"
        for name, file in named.items()
        if file not in (None, "auto", "None") and not Path(file).exists()
    ]
    for group in groups:
        absent += _absent(group, getattr(root, group))
    if "vae.weights" in named and None not in (root.vae, root.data):
        from sandbox.earlier import other_first_stage

        absent += other_first_stage(root)
    try:
        wiring = wire(root)
    except ConfigError as e:
        raise ConfigError(*e.problems, *absent) from e
    if absent:
        raise ConfigError(*absent)
    return wiring


def _absent(group: str, cfg: PluginConfig | None) -> list[str]:
    """Files and folders of a component that are not there, a line each."""
    return [
        f"{group}.{name}=null: name the file or folder of the {group}"
        if file is None
        else f"{group}.{name}={file}: no such file or folder"
        for name, file in (cfg.files() if cfg is not None else {}).items()
        if file is None or not Path(file).expanduser().exists()
    ]


def check(cfg: Any, overrides: Sequence[str]) -> None:
    """Raises every configuration error of a job, as starting it would."""
    checked(settled(config.to_root(cfg), overrides))


# --- showing --------------------------------------------------------------------------------------


def _hydra_shows(line: Line) -> int:
    """--cfg, --info, shell completion: Hydra answers, once the configuration is found sound."""
    from omegaconf import OmegaConf

    from sandbox import recipes

    if "--version" in line.flags:
        print(f"Hydra {version('hydra-core')}")
        return 0
    part = line.flags.get("--package")
    if line.flags.keys() & SHOW.keys():
        cfg = line.compose(line.overrides)
        if part and OmegaConf.select(cfg, part) is None:
            raise ConfigError(f"--package {part}: there is no such part of the configuration")
    hydra = recipes.hydra(config.CONF, config.GROUPS)
    overrides = [*line.overrides, *config.search_path(line.overrides, line.config_dir)]
    if "--shell-completion" in line.flags:
        _check_completion(line.overrides)
        config.setup(os.environ.get("COMP_LINE", "").split())
        hydra.shell_completion(line.config_name, overrides)
    elif shown := line.flags.get("--cfg"):
        hydra.show_cfg(line.config_name, overrides, shown, part, "--resolve" in line.flags)
    else:
        hydra.show_info(line.flags["--info"] or "all", line.config_name, overrides)
    return 0


def _check_completion(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra's shell completion does not know."""
    verb, _, shell = overrides[0].partition("=") if len(overrides) == 1 else ("", "", "")
    if verb not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise ConfigError("--shell-completion: want install=bash, or zsh or fish")
    if verb == "query" and "COMP_LINE" not in os.environ:
        raise ConfigError(f"--shell-completion {overrides[0]}: only a shell asks this (COMP_LINE)")


def report(error: SandboxError, before: str = "") -> None:
    """One message on stderr, without secrets."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    if len(problems) == 1:
        text = f"{before}error: {problems[0]}"
    else:
        text = "\n".join([f"{before}{len(problems)} errors:", *(f"  - {p}" for p in problems)])
    text = "\n".join([text, *getattr(error, "__notes__", [])])
    if trace := getattr(error, "traceback", ""):  # of a rank, where nobody foresaw it
        text = f"{trace}{text}\n{BUG}"
    print(mask_text(text), file=sys.stderr, flush=True)
