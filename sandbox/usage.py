"""The text of --help: the groups, the options of a group, or the settings of an option.

Imports nothing heavy: descriptions are read from docstrings and the comments of YAML files.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.config import GROUPS, Root, conf_folders
from sandbox.contracts import ConfigError

HEAD = """\
Trains, samples and evaluates latent diffusion models of images and video.

  python run.py                                    train text to video on moving digits (2 minutes)
  python run.py backbone=dit vae=magvit steps=200  choose options, change settings
  python run.py -m lr=1e-5,2e-6 seeds=3            a sweep: one run for each value and seed
  python run.py experiment=NAME                    a recipe; backbone=dit exchanges its network
  python run.py task=sample 'prompts=[a red 3]'    sample from the newest finished run
  python run.py task=new group=vae name=mine       create a plugin with a preset and a test

GROUP=OPTION chooses a component, GROUP.SETTING=VALUE one of its settings, SETTING=VALUE a setting
of the run. GROUP=null leaves a group empty. More help:

  python run.py --help GROUP                       options and presets; also experiment
  python run.py --help GROUP=OPTION                settings of an option or preset
"""

FLAGS = """\
Flags: -m (sweep), --cfg job (print the configuration), --info defaults (show its files), -cd DIR
  (more YAML files), -sc install=bash (shell completion), --traceback (with every error).
Exit codes: 0 finished, 1 bug, 2 wrong input, 3 data, 4 diverged, 5 storage, 75 preempted and saved
  (run the same command again), 130 interrupted.
"""
PRESETS = {"experiment": "recipes, one page each", "debug": "quick checks of any recipe"}
WIDEST = 100


def usage(overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The overview, as wide as the terminal; the options of groups; or the settings of options.

    Raises ConfigError for a word that names no group.
    """
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    words = [o for o in overrides if "=" not in o]
    if unknown := [w for w in words if w not in GROUPS | PRESETS]:
        raise ConfigError(
            *(f"--help {w}: no such group{registry.nearest(w, GROUPS | PRESETS)}" for w in unknown)
        )
    chosen = [o for o in overrides if "=" in o]
    lines = [line for word in words for line in _group(word, conf_folders(chosen, config_dir))]
    if any(o.partition("=")[0] in GROUPS for o in chosen):
        lines += _chosen(chosen, config_dir, width)
    if lines:
        return "\n".join(part for line in lines for part in _wrapped(line, width))
    return "\n".join([HEAD, *_overview(width), "", FLAGS])


def _overview(width: int) -> Iterator[str]:
    """The settings of a run, and each group with its plugins."""
    yield from _row("SETTING", ", ".join(_settings(Root())), width)
    for group in GROUPS:
        names = [f"{p.name}{' (broken)' * bool(p.error)}" for p in registry.plugins(group)]
        if names:
            yield from _row(group, ", ".join(names), width)
    for group, what in PRESETS.items():
        yield from _row(group, f"{what} (--help {group})", width)


def _group(group: str, folders: Sequence[Path]) -> Iterator[str]:
    """What a group is, its plugins, and its presets, each with a description."""
    yield f"{group}: {(GROUPS | PRESETS)[group]}"
    for plugin in registry.plugins(group):
        yield f"  {plugin.name:<24}  {f'(broken) {plugin.error}' if plugin.error else plugin.doc}"
    presets = [(f / group, p) for f in folders for p in sorted((f / group).rglob("*.yaml"))]
    if presets and group in GROUPS:
        yield "presets"
    for folder, path in presets:
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield f"  {name:<24}  {_comment(path)}"
    yield ""


def _chosen(overrides: Sequence[str], config_dir: str | None, width: int) -> Iterator[str]:
    """What the chosen options are, and their settings with values and meaning."""
    from sandbox.reference import sayings

    root = config.to_root(config.compose(overrides, config_dir=config_dir))
    groups = {o.partition("=")[0] for o in overrides}
    for path, cfg in root.parts():
        if path.partition(".")[0] in groups:
            plugin = registry.find(cfg.plugin)
            yield f"{path}={plugin.name}: {plugin.doc}"
            doc = inspect.getdoc(type(cfg)) or ""
            if not doc.startswith(f"{type(cfg).__name__}("):  # what dataclass writes where none is
                yield f"    {' '.join(doc.split())}"
            notes = sayings(type(cfg), plugin.path, plugin.module)
            for setting in _settings(cfg):
                note = notes.get(setting.partition("=")[0], ("", ""))[1]
                yield f"  {f'{path}.{setting}':<38}  {note}".rstrip()
            yield ""


def _settings(cfg: Any) -> Iterator[str]:
    """Each setting as it is typed: name=value."""
    words = {None: "null", True: "true", False: "false"}
    for f in fields(cfg):
        if f.name not in (*GROUPS, "plugin"):
            value = getattr(cfg, f.name)
            said = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
            known = value is None or isinstance(value, bool)
            yield f"{f.name}={words[value] if known else said}"


def _comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _row(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(f"{name:<15} {text}", width, subsequent_indent=" " * 16,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _wrapped(line: str, width: int) -> list[str]:
    """A line in the width of the terminal; its second column stays one."""
    head, gap, text = line.rpartition("  ")
    indent = " " * (len(head + gap) if text and head.strip() else len(line) - len(line.lstrip()))
    return textwrap.wrap(line, max(width, len(indent) + 40), subsequent_indent=indent,
                         drop_whitespace=True, break_long_words=False) or [""]  # fmt: skip
