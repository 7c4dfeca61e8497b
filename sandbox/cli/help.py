"""The text of --help: the groups, the options of a group, or the settings of an option.

Descriptions come from docstrings and comments in YAML files, so no plugin is imported.
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox.cli.reference import about, docstring, field_notes, settings
from sandbox.config import composition, registry
from sandbox.config.discovery import conf_folders
from sandbox.config.overrides import key
from sandbox.config.root import GROUPS, YAML_GROUPS, Root, to_root
from sandbox.contracts import ConfigError

HEAD = """\
Trains, samples and evaluates latent diffusion models of images and video.

  python run.py                                    train text-to-video on moving digits (2 minutes)
  python run.py backbone=dit vae=magvit steps=200  choose options, change settings
  python run.py -m lr=1e-5,2e-6 seeds=3            a sweep: one run per value and seed
  python run.py experiment=NAME                    a recipe; backbone=dit swaps its network
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
MAX_WIDTH = 100


def usage(overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The overview, the options of the groups, or the settings of the options in `overrides`.

    Raises ConfigError for an unknown group.
    """
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    groups, known = [o for o in overrides if "=" not in o], GROUPS | YAML_GROUPS
    if unknown := [g for g in groups if g not in known]:
        raise ConfigError(
            *(f"--help {g}: no such group{registry.nearest(g, known)}" for g in unknown)
        )
    chosen = [o for o in overrides if "=" in o]
    lines = [line for g in groups for line in _group(g, conf_folders(chosen, config_dir))]
    if any(key(o) in GROUPS for o in chosen):
        lines += _chosen(chosen, config_dir, width)
    if lines:
        return "\n".join(part for line in lines for part in _wrapped(line, width))
    return "\n".join([HEAD, *_overview(width), "", FLAGS])


def _overview(width: int) -> Iterator[str]:
    """The settings of a run, and each group with its plugins."""
    own = [s for s in settings(Root()) if key(s) not in GROUPS]
    yield from _row("SETTING", ", ".join(own), width)
    for group in GROUPS:
        names = [f"{p.name}{' (broken)' * bool(p.error)}" for p in registry.plugins(group)]
        if names:
            yield from _row(group, ", ".join(names), width)
    for group, description in YAML_GROUPS.items():
        yield from _row(group, f"{description} (--help {group})", width)


def _group(group: str, folders: Sequence[Path]) -> Iterator[str]:
    """A group, its plugins and its presets, with descriptions."""
    yield f"{group}: {(GROUPS | YAML_GROUPS)[group]}"
    for plugin in registry.plugins(group):
        yield f"  {plugin.name:<24}  {f'(broken) {plugin.error}' if plugin.error else plugin.doc}"
    presets = [(f / group, p) for f in folders for p in sorted((f / group).rglob("*.yaml"))]
    if presets and group in GROUPS:
        yield "presets"
    for folder, path in presets:
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield f"  {name:<24}  {about(path)}"
    yield ""


def _chosen(overrides: Sequence[str], config_dir: str | None, width: int) -> Iterator[str]:
    """The chosen options with their settings, values and descriptions."""
    root = to_root(composition.compose(overrides, config_dir=config_dir))
    groups = {key(o) for o in overrides}
    for path, cfg in root.parts():
        if path.partition(".")[0] in groups:
            plugin = registry.find(cfg.plugin)
            yield f"{path}={plugin.name}: {plugin.doc}"
            if doc := docstring(type(cfg)):
                yield f"    {' '.join(doc.split())}"
            notes = field_notes(type(cfg), plugin.path, plugin.module)
            for setting in settings(cfg):
                note = notes.get(key(setting), ("", ""))[1]
                yield f"  {f'{path}.{setting}':<38}  {note}".rstrip()
            yield ""


def _row(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(f"{name:<15} {text}", width, subsequent_indent=" " * 16,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _wrapped(line: str, width: int) -> list[str]:
    """Wraps a line to the terminal's width, and indents the rest to its second column."""
    head, gap, text = line.rpartition("  ")
    indent = " " * (len(head + gap) if text and head.strip() else len(line) - len(line.lstrip()))
    return textwrap.wrap(line, max(width, len(indent) + 40), subsequent_indent=indent,
                         drop_whitespace=True, break_long_words=False) or [""]  # fmt: skip
