"""Parses a command line into flags and overrides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox.config import composition, registry
from sandbox.config.overrides import key, value
from sandbox.contracts import ConfigError

SHOW = {  # flags that print something, with their values
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
SHORT = {"-c": "--cfg", "-i": "--info", "-m": "--multirun", "-h": "--help", "-p": "--package",
         "-cn": "--config-name", "-cd": "--config-dir", "-sc": "--shell-completion"}  # fmt: skip
WITH_VALUE = ("--cfg", "--package", "--config-name", "--config-dir")
PLAIN = ("--multirun", "--help", "--resolve", "--shell-completion", "--version", "--traceback")
MAX_SEEDS = 1000
KNOWN = (*PLAIN, *WITH_VALUE, "--info", *SHORT)


@dataclass
class Line:
    """A parsed command line: long flags with their values, and overrides in order."""

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
    """Parses flags and overrides in any order (plain Hydra rejects `a=b -m`).

    Raises ConfigError for unknown flags and for settings that are given twice.
    """
    line, words, problems = Line(), list(argv), []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            line.overrides.append(word)
            continue
        name, has_value, given = word.partition("=")
        flag = SHORT.get(name, name)
        if flag not in KNOWN:
            near = registry.nearest(name, KNOWN) if len(name) > 3 else "; --help lists them"
            problems.append(f"{name}: no such flag{near}")
            continue
        if flag == "--info" and not has_value:
            given = words.pop(0) if words and words[0] in SHOW[flag] else "all"
        elif flag in WITH_VALUE and not has_value:
            if not words:
                problems.append(f"{name}: needs a value")
                continue
            given = words.pop(0)
        if flag in SHOW and given not in SHOW[flag]:
            problems.append(f"{name} {given}: want one of {', '.join(SHOW[flag])}")
        line.flags[flag] = given or None
    problems += _duplicates(line.overrides)
    if problems:
        raise ConfigError(*problems)
    return line


def _duplicates(overrides: Sequence[str]) -> Iterator[str]:
    given: dict[str, list[str]] = {}
    for override in overrides:
        given.setdefault(key(override), []).append(override)
    for name, same in given.items():
        if len(same) > 1:
            yield f"{' '.join(same)}: {name} is given twice; keep one"


def take_seeds(line: Line) -> int | None:
    """Removes `seeds=3` from a command line, and returns 3: runs with seeds 0, 1 and 2."""
    words = [o for o in line.overrides if o.startswith("seeds=")]
    if not words:
        return None
    count = value(words[0])
    if not count.isdecimal() or not 1 <= int(count) <= MAX_SEEDS:
        raise ConfigError(f"{words[0]}: want a number from 1 to {MAX_SEEDS}; it is seed=0,1,...")
    other = [o for o in line.overrides if o.startswith("seed=")]
    if other:
        raise ConfigError(f"{other[0]} {words[0]}: keep one; seeds=3 is seed=0,1,2")
    line.overrides.remove(words[0])
    return int(count)
