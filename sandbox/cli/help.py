"""The text of --help: groups, their options, and one line for each, from docstrings and presets.

Imports nothing heavy. Where the command line chooses an option, its settings are listed instead.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sandbox.config import composition, registry
from sandbox.config.discovery import conf_folders
from sandbox.config.root import GROUPS, Root, to_root

HEAD = """\
Latent video sandbox: trains, samples and scores latent diffusion models of images and video.

  python run.py                                          text to video on real digits: two minutes
  python run.py backbone=dit vae=magvit -m lr=1e-5,2e-6  a sweep (-m): one run for each value
  python run.py experiment=NAME                          a recipe
  python run.py task=sample 'prompts=[a red 3 moving left]'
                                                         videos from the newest finished run
  python run.py task=new group=backbone name=mine        a plugin of your own, with preset and test
  python run.py --help backbone=dit                      the settings of an option

GROUP=OPTION chooses a component, GROUP.SETTING=VALUE sets one of its numbers, SETTING=VALUE one of
the run's; null is an empty value.
"""

FLAGS = """\
Flags: -m (multirun: a,b,c tries each), --cfg job (print the configuration), --info defaults (where
  it comes from), -cd DIR (more YAML files), -sc install=bash (shell completion), --traceback (with
  an error). Flags and settings may come in any order.
Exit codes: 0 done, 2 wrong input, 3 data, 4 diverged, 5 storage, 75 stopped and saved (start again
  to continue), 130 interrupted, 1 a bug.
"""


def usage(overrides: Sequence[str] = (), config_dir: str | None = None) -> str:
    """The whole text, as wide as the terminal; or the settings of the options in `overrides`."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    if any(o.partition("=")[0] in GROUPS for o in overrides):
        return "\n".join(_chosen(overrides, config_dir, width))
    folders = conf_folders(overrides, config_dir)
    parts = [HEAD, "Settings of the run: " + ", ".join(_settings(Root())) + "\n"]
    parts += ["Groups and their options"]
    presets = {"experiment": "recipes", "debug": "quick checks of any recipe"}
    for group, what in (GROUPS | presets).items():
        rows = list(_options(group, folders))
        if rows:
            parts.append(f"\n{group}: {what}")
            parts += [_row(name, doc, width) for name, doc in rows]
    return "\n".join([*parts, "", FLAGS])


def _chosen(overrides: Sequence[str], config_dir: str | None, width: int) -> Iterator[str]:
    """What the chosen options are, and their settings with the values that they stand for."""
    root = to_root(composition.compose(overrides, config_dir=config_dir))
    groups = {o.partition("=")[0] for o in overrides}
    for path, cfg in root.parts():
        if path.partition(".")[0] in groups:
            yield f"{path}={cfg.plugin.rpartition('/')[2]}: {registry.find(cfg.plugin).doc}"
            doc = inspect.getdoc(type(cfg)) or ""
            if not doc.startswith(f"{type(cfg).__name__}("):  # what dataclass writes where none is
                yield textwrap.indent(textwrap.fill(doc, width - 4), "    ")
            yield from (f"  {path}.{setting}" for setting in _settings(cfg))
            yield ""


def _settings(cfg: Any) -> Iterator[str]:
    """Each setting as one types it: name=value."""
    words = {None: "null", True: "true", False: "false"}
    for f in fields(cfg):
        if f.name not in (*GROUPS, "plugin"):
            value = getattr(cfg, f.name)
            said = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
            known = value is None or isinstance(value, bool)
            yield f"{f.name}={words[value] if known else said}"


def _options(group: str, folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for p in registry.plugins():
        if p.group == group or p.group.startswith(group + "/"):
            yield p.name, f"(broken) {p.error}" if p.error else p.doc
    for folder in folders:
        for path in sorted((folder / group).glob("*.yaml")):
            yield path.stem, _comment(path)


def _comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _row(name: str, doc: str, width: int) -> str:
    lines = textwrap.wrap(doc, max(width - 28, 40)) or [""]
    shown = (f"  {'' if i else name:<24}  {text}".rstrip() for i, text in enumerate(lines))
    return "\n".join(shown)
