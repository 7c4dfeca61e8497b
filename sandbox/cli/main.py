"""The command `python run.py`: parses, composes, checks and runs jobs, without importing torch.

A multirun starts only if every job passes its checks. Exit codes: 0 finished, 1 bug (the only one
with a traceback by default), 2 wrong input, 3 data, 4 diverged, 5 storage or environment,
75 preempted, 130 interrupted.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sandbox.cli.command_line import SHOW, Line, parse, take_seeds
from sandbox.cli.errors import BUG, report
from sandbox.cli.jobs import perform, resolve_run
from sandbox.cli.wandb_agent import translate_overrides
from sandbox.config import composition, discovery, hydra_compose
from sandbox.config.paths import CONF
from sandbox.config.plugin_faults import naming_plugins
from sandbox.config.root import GROUPS, to_root
from sandbox.config.secrets import masked_console
from sandbox.contracts import ConfigError, SandboxError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line and exits with its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with masked_console():
        code = _exit_code(argv)
    sys.exit(code)


def _exit_code(argv: list[str]) -> int:
    """Runs a command line, prints its error, and returns its exit code."""
    try:
        with naming_plugins():
            return _main(argv)
    except SandboxError as e:
        report(e)
        if "--traceback" in argv:
            traceback.print_exception(e)
        return e.exit_code
    except BrokenPipeError:  # closed pipe: `python run.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as e:  # a bug
        traceback.print_exception(e)
        print(f"error: {BUG}", file=sys.stderr)
        return 1


def _main(argv: list[str]) -> int:
    line = parse(argv)
    line.overrides = translate_overrides(line.overrides)
    discovery.setup(line.overrides)
    line.overrides = composition.expand_shorthands(line.overrides, line.config_dir)
    seeds = take_seeds(line)
    if "--help" in line.flags:
        from sandbox.cli.help import usage

        print(usage(line.overrides, line.config_dir))
        return 0
    if line.flags.keys() & {*SHOW, "--shell-completion", "--version"}:
        return _hydra_output(line)
    from sandbox.runs.lookup import inherited_options

    run_options = inherited_options(line.overrides)
    if "--multirun" not in line.flags and seeds is None:
        root = to_root(line.compose([*run_options, *line.overrides]))
        perform(resolve_run(root, line.overrides), line.overrides)
        return 0
    from sandbox.cli import multirun

    if seeds is None or "--multirun" in line.flags or "WANDB_SWEEP_ID" not in os.environ:
        return multirun.multirun(line, run_options, seeds)
    multirun.trial(line, run_options, seeds)
    return 0


def _hydra_output(line: Line) -> int:
    """--cfg, --info, --version and shell completion: Hydra prints, after our checks."""
    from omegaconf import OmegaConf

    from sandbox.config import recipes

    if "--version" in line.flags:
        print(f"Hydra {version('hydra-core')}")
        return 0
    part = line.flags.get("--package")
    cfg: Any = None
    if line.flags.keys() & SHOW.keys():
        cfg = line.compose(line.overrides)
        if "--resolve" in line.flags:
            to_root(cfg)  # its errors name the setting
        if part and OmegaConf.select(cfg, part) is None:
            raise ConfigError(f"--package {part}: there is no such part of the configuration")
    overrides = [*line.overrides, *hydra_compose.search_path(line.overrides, line.config_dir)]
    shown = line.flags.get("--cfg")
    hydra = recipes.shown(cfg) if shown else recipes.hydra(CONF, GROUPS)
    if "--shell-completion" in line.flags:
        _check_completion(line.overrides)
        discovery.setup(os.environ.get("COMP_LINE", "").split())
        hydra.shell_completion(line.config_name, overrides)
    elif shown:
        hydra.show_cfg(line.config_name, overrides, shown, part, "--resolve" in line.flags)
    else:
        hydra.show_info(line.flags["--info"] or "all", line.config_name, overrides)
    return 0


def _check_completion(overrides: Sequence[str]) -> None:
    """Raises ConfigError for an invalid request to Hydra's shell completion."""
    verb, _, shell = overrides[0].partition("=") if len(overrides) == 1 else ("", "", "")
    if verb not in ("install", "uninstall", "query") or shell not in ("bash", "zsh", "fish"):
        raise ConfigError("--shell-completion: want install=bash, or zsh or fish")
    if verb == "query" and "COMP_LINE" not in os.environ:
        raise ConfigError(f"--shell-completion {overrides[0]}: only a shell asks this (COMP_LINE)")
