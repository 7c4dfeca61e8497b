"""The text of --help: groups, their options, and one line for each, from docstrings and presets. Imports nothing heavy."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox import registry
from sandbox.config import CONF, GROUPS, Root, plugin_folders

HEAD = """\
Latent video sandbox: trains, samples and scores latent diffusion models of images and video.

  python run.py                                             the default run: text to video on real digits, about two minutes
  python run.py backbone=dit vae=magvit -m lr=1e-5,2e-6     a sweep (-m): one run for each value
  python run.py experiment=NAME                             a recipe
  python run.py task=sample task.prompts='[a red 3 moving left]'   videos from the newest finished run
  python run.py task=new group=backbone name=mine           a plugin of your own, with preset and test

GROUP=OPTION chooses a component, GROUP.SETTING=VALUE sets one of its numbers, SETTING=VALUE one of the run's.
"""

FLAGS = """\
Flags: -m (multirun: a,b,c tries each), --cfg job (print the configuration), --info defaults (where it comes from),
  -cd DIR (more configuration files), -sc install=bash (shell completion), --traceback (on an error).
Exit codes: 0 done, 2 wrong input, 3 data, 4 diverged, 5 storage, 75 stopped and saved (start again to continue), 1 bug.
"""


def usage(overrides: Sequence[str] = ()) -> str:
    """The whole text, as wide as the terminal."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    folders = [CONF, *(f / "conf" for f in plugin_folders(overrides))]
    parts = [HEAD, "Settings of the run: " + ", ".join(_settings()) + "\n", "Groups and their options"]
    for group, what in {**GROUPS, "experiment": "recipes", "debug": "quick checks of any recipe"}.items():
        rows = list(_options(group, folders))
        if rows:
            parts.append(f"\n{group}: {what}")
            parts += [_row(name, doc, width) for name, doc in rows]
    return "\n".join([*parts, "", FLAGS])


def _settings() -> Iterator[str]:
    for name, default in vars(Root()).items():
        if name not in GROUPS:
            yield f"{name}={'null' if default is None else default}"


def _options(group: str, folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for p in registry.plugins():
        if p.group == group or p.group.startswith(group + "/"):
            yield p.name, f"(broken) {p.error}" if p.error else p.doc
    for folder in folders:
        for path in sorted((folder / group).glob("*.yaml")):
            yield path.stem, _comment(path)


def _comment(path: Path) -> str:
    for line in path.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _row(name: str, doc: str, width: int) -> str:
    lines = textwrap.wrap(doc, max(width - 28, 40)) or [""]
    return "\n".join(f"  {name if i == 0 else '':<24}  {text}".rstrip() for i, text in enumerate(lines))
