"""The text of --help: the groups, the options of a group, or the settings of an option.

Descriptions come from docstrings and comments in YAML files, so no plugin is imported. The text
is the template `help.txt.j2`.
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox.cli.reference import description, docstring, field_notes, settings
from sandbox.config import composition, registry
from sandbox.config.discovery import conf_folders
from sandbox.config.overrides import key
from sandbox.config.root import GROUPS, YAML_GROUPS, Root, to_root
from sandbox.contracts import ConfigError
from sandbox.reports.pages import render

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
    chosen, parts = [o for o in overrides if "=" in o], []
    if any(key(o) in GROUPS for o in chosen):
        root = to_root(composition.compose(chosen, config_dir=config_dir))
        named = {key(o) for o in chosen}
        parts = [(path, cfg) for path, cfg in root.parts() if path.partition(".")[0] in named]

    def presets(group: str) -> Iterator[tuple[str, Path]]:
        for folder in (f / group for f in conf_folders(chosen, config_dir)):
            for path in sorted(folder.rglob("*.yaml")):
                yield path.relative_to(folder).with_suffix("").as_posix(), path

    text = render(
        "help.txt", groups=groups, parts=parts, known=GROUPS, yaml_groups=YAML_GROUPS,
        own=[s for s in settings(Root()) if key(s) not in GROUPS], plugins=registry.plugins,
        find=registry.find, presets=presets, description=description, docstring=docstring,
        field_notes=field_notes, settings=settings,
    )  # fmt: skip
    return "\n".join(part for line in text.splitlines() for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    """Wraps a line to the terminal's width, and indents the rest to its second column."""
    head, gap, text = line.rpartition("  ")
    indent = " " * (len(head + gap) if text and head.strip() else len(line) - len(line.lstrip()))
    return textwrap.wrap(line, max(width, len(indent) + 40), subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False) or [""]  # fmt: skip
