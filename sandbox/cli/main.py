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
from importlib.metadata import version

from sandbox.cli.command_line import SHOW, Line, parse, take_seeds
from sandbox.cli.errors import BUG, report
from sandbox.cli.jobs import run
from sandbox.cli.wandb_agent import translate_overrides
from sandbox.config import composition, discovery, hydra_compose
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS
from sandbox.contracts import ConfigError, SandboxError


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


def _main(argv: list[str]) -> int:
    line = parse(argv)
    line.overrides = translate_overrides(line.overrides)
    discovery.setup(line.overrides)
    line.overrides = composition.expand(line.overrides)
    seeds = take_seeds(line)
    if "--help" in line.flags:
        from sandbox.cli.help import usage

        print(usage(line.overrides, line.config_dir))
        return 0
    if line.flags.keys() & {*SHOW, "--shell-completion", "--version"}:
        return _hydra_shows(line)
    from sandbox.runs.lookup import choices

    earlier = choices(line.overrides)
    if seeds is not None and "--multirun" not in line.flags and "WANDB_SWEEP_ID" in os.environ:
        from sandbox.cli.multirun import trial

        trial(line, earlier, seeds)
        return 0
    if "--multirun" in line.flags or seeds is not None:
        from sandbox.cli.multirun import multirun

        return multirun(line, earlier, seeds)
    run(line.compose([*earlier, *line.overrides]), line.overrides)
    return 0


# --- showing --------------------------------------------------------------------------------------


def _hydra_shows(line: Line) -> int:
    """--cfg, --info, shell completion: Hydra answers, once the configuration is found sound."""
    from omegaconf import OmegaConf

    from sandbox.config import recipes

    if "--version" in line.flags:
        print(f"Hydra {version('hydra-core')}")
        return 0
    part = line.flags.get("--package")
    if line.flags.keys() & SHOW.keys():
        cfg = line.compose(line.overrides)
        if part and OmegaConf.select(cfg, part) is None:
            raise ConfigError(f"--package {part}: there is no such part of the configuration")
    hydra = recipes.hydra(CONF, GROUPS)
    overrides = [*line.overrides, *hydra_compose.search_path(line.overrides, line.config_dir)]
    if "--shell-completion" in line.flags:
        _check_completion(line.overrides)
        discovery.setup(os.environ.get("COMP_LINE", "").split())
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
