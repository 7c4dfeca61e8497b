"""Translates the parameters that a W&B sweep agent passes into Hydra overrides.

The agent formats them as Python literals: None, {'a': 1}. Hydra reads the first as a string and
rejects the second. The agent also writes them to a file, which keeps their types.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox.config.overrides import quote
from sandbox.config.root import GROUPS

PARAMETERS = "WANDB_SWEEP_PARAM_PATH"


def translate_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides with the agent's None, lists and dictionaries in Hydra's grammar.

    A dictionary given for a group sets its settings: backbone={'width': 8} is backbone.width=8.
    """
    found: list[str] = []
    known = _parameters()
    for word in overrides:
        name = word.partition("=")[0]
        if name in known and (known[name] is None or isinstance(known[name], Mapping | list)):
            found += _overrides(name, known[name])
        else:
            found.append(word)
    return found


def _parameters() -> dict[str, Any]:
    """Parameter name -> value of this trial; empty without an agent."""
    path = os.environ.get(PARAMETERS)
    if not path or not Path(path).is_file():
        return {}
    import yaml

    node = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return {k: v["value"] for k, v in node.items() if isinstance(v, dict) and "value" in v}


def _overrides(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and name.partition(".")[0] in GROUPS and value:
        return [word for k, v in value.items() for word in _overrides(f"{name}.{k}", v)]
    return [f"{name}={literal(value)}"]


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, str):
        return quote(value)
    return str(value)
