"""Which settings determine a run: the hash in its name, and differences between two runs."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.config.added_settings import without_added
from sandbox.config.secrets import mask

# Settings that do not change a result, and all below them. They are not part of a run's identity
# and may differ when it is resumed.
IGNORED = (
    "out",
    "cache",
    "resume",
    "logger",
    "checkpoint",
    "plugins_path",
    "*.num_workers",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.log_every",
    "trainer.low_vram",
    "trainer.timeout",
    "hydra",
)
# Groups and settings that determine the operations of an optimizer step.
WORK = ("data", "vae", "backbone", "conditioning", "adapter", "trainable", "precision", "trainer")


def identity(config: Mapping[str, Any]) -> str:
    """Eight hex digits, a hash of every setting that may change the result."""
    return _hash(flat_settings(mask(without_added(config))))


def identity_of_work(config: Mapping[str, Any]) -> str:
    """Eight hex digits, a hash of every setting that changes the operations of a step."""
    settings = flat_settings(without_added(config))
    return _hash({k: v for k, v in settings.items() if k.partition(".")[0] in WORK})


def _hash(settings: Mapping[str, str]) -> str:
    counted = sorted((k, v) for k, v in settings.items() if not matches(k, IGNORED))
    return hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:8]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line per setting that differs: "lr: 0.1 -> 0.2"; secrets are not compared."""
    return [f"{name}: {a} -> {b}" for name, (a, b) in changes(old, new).items()]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> both values of settings that differ."""
    a, b = flat_settings(mask(old)), flat_settings(mask(new))
    pairs = {k: (a.get(k, "(absent)"), b.get(k, "(absent)")) for k in {**a, **b}}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def flat_settings(node: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> value as JSON text, so that also NaN equals itself."""
    if isinstance(node, Mapping) and node:
        found: dict[str, str] = {}
        for key, value in node.items():
            found |= flat_settings(value, f"{name}.{key}" if name else str(key))
        return found
    return {name: json.dumps(node, default=str)} if name else {}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a setting, or one that it is part of, matches a pattern."""
    return any(
        fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns
    )
