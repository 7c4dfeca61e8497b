"""A command line, sorted into flags and overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox.config import composition, registry
from sandbox.contracts import ConfigError

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
        return composition.compose(overrides, self.config_name, self.config_dir)


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
