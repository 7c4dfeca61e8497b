"""Limits on YAML files of others: size, depth, aliases that expand, files in a circle."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra.plugins.config_source import ConfigResult

from sandbox.contracts import ConfigError

LARGEST = 2**20  # bytes of a file
DEEPEST = 40  # lists and maps inside one another
MOST = 100_000  # values of a file once its aliases are expanded
NESTED = re.compile(r"\$\{[^}]*" * 20)  # interpolations inside one another
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's source of YAML files; checks each file before Hydra reads it.

    It has the name of Hydra's class, since Hydra registers one class name for a scheme.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        check(Path(os.path.realpath(Path(self.path, self._normalize_file_name(config_path)))))
        return super().load_config(config_path)


def check(path: Path) -> None:
    """Raises ConfigError for a file that is too large, too deep, or expands to too much."""
    if not path.is_file():
        raise ConfigError(f"{path}: no regular file; want a YAML file")
    if (size := path.stat().st_size) > LARGEST:
        raise ConfigError(f"{path}: {size} bytes; want a YAML file of at most {LARGEST}")
    try:
        text = path.read_text(encoding="utf-8")
        problem = _problem(text)
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(e, "problem", None) or str(e).partition("\n")[0]
        raise ConfigError(f"{path}{line}: not YAML: {reason}") from e
    if problem:
        raise ConfigError(f"{path}: {problem}")


def _problem(text: str) -> str | None:
    if NESTED.search(text):
        return "interpolations are nested more than 20 deep; want fewer"
    total, sizes = 0, {}  # values so far; values below each anchor
    started: list[tuple[str | None, int]] = []  # open lists and maps: anchor, total before
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                return f"the alias *{event.anchor} is inside of what it names; write it out"
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            started.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = started.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1
            total += 1
        if len(started) > DEEPEST:
            return f"lists and maps are nested more than {DEEPEST} deep; want fewer"
        if total > MOST:
            return f"more than {MOST} values once its aliases are expanded; want fewer"
    return None


def include_cycle(groups: Sequence[tuple[str, str]], folders: Sequence[Path]) -> str | None:
    """The chain of files that include one another, starting from these options: `a -> b -> a`."""
    for group, name in groups:
        if found := _find_cycle(f"{group}/{name}", folders, ()):
            return " -> ".join(found)
    return None


def _find_cycle(
    option: str, folders: Sequence[Path], above: tuple[str, ...]
) -> tuple[str, ...] | None:
    if option in above:
        return (*above[above.index(option) :], option)
    for included in _included(option, folders):
        if found := _find_cycle(included, folders, (*above, option)):
            return found
    return None


def _included(option: str, folders: Sequence[Path]) -> Iterator[str]:
    """The options in the defaults list of a file, as GROUP/NAME."""
    path = next((p for f in folders if (p := f / f"{option}.yaml").is_file()), None)
    node = yaml.load(path.read_text(encoding="utf-8"), LOADER) if path else None
    defaults: Any = node.get("defaults") if isinstance(node, dict) else None
    own = option.rpartition("/")[0]
    for entry in defaults or ():
        for place, name in entry.items() if isinstance(entry, dict) else [("", entry)]:
            group = str(place).removeprefix("override ").partition("@")[0].strip()
            included = "/".join(filter(None, (group, str(name).partition("@")[0])))
            if name and name != "_self_":
                yield included[1:] if included.startswith("/") else f"{own}/{included}"
