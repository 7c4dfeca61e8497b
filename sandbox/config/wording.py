"""How problems of a configuration name its components and settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from sandbox.config import registry
from sandbox.contracts import PluginConfig, Slots


def of_part(part: str, cfg: PluginConfig, problem: str, why: str = "") -> str:
    """A problem of a Config with the setting, or the component itself, as the user types it."""
    problem = problem.removeprefix(f"{part}=")
    name, rest = re.match(r"(\w*)(.*)", problem, re.DOTALL).groups()  # type: ignore[union-attr]
    if name == name_of(cfg):
        return f"{part}={name}{rest}{why}"
    return f"{part}.{problem}{why}"


def field_of(problem: str) -> str:
    """The setting at the start of a problem."""
    return re.split(r"[^\w.]", problem)[0]


def name_of(cfg: PluginConfig) -> str:
    return cfg.plugin.rpartition("/")[2]


def listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def options(group: str, works: Callable[[Any], bool], last: str = "other data") -> str:
    """The plugins of a group that work with their defaults, and `last`: "a=x or a=y"."""

    def candidates() -> Iterator[str]:
        for p in registry.plugins(group):
            if p.config and works(p.config(plugin=p.key)):
                yield f"{group}={p.name}"

    return " or ".join([*candidates(), *([last] if last else [])])


def slot_sizes(slots: Slots) -> str:
    return (
        ", ".join(f"{n}={getattr(slots, n)}" for n in sorted(slots.names() - slots.scalars))
        or "nothing"
    )
