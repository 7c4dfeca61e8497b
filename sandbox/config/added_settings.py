"""Settings that joined a Config later (`contracts.added`): hashes and records of older runs stay.

Both functions take plain containers, in which a dict with `plugin` has that plugin's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sandbox.config import registry
from sandbox.config.root import Root, to_container
from sandbox.contracts import ADDED, PluginError


def without_added(node: Any) -> Any:
    """`node` without added settings that have their default: what hashes and protocols count."""
    if isinstance(node, Mapping):
        new = _added(node)
        return {k: without_added(v) for k, v in node.items() if k not in new or v != new[k]}
    return [*map(without_added, node)] if isinstance(node, list | tuple) else node


def with_added(node: Any) -> Any:
    """`node`, recorded by an older version, with the defaults of added settings that it lacks."""
    if isinstance(node, Mapping):
        return {k: with_added(v) for k, v in {**node, **_added(node), **node}.items()}
    return [*map(with_added, node)] if isinstance(node, list | tuple) else node


def _added(node: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> default of the added settings of the Config that `node` holds."""
    config: type | None = Root if "recipe" in node and "task" in node else None
    if isinstance(key := node.get("plugin"), str) and key:
        try:
            config = registry.find(key).config
        except PluginError:  # the plugin is gone or broken
            return {}
    found = fields(config) if config else ()  # type: ignore[arg-type]
    return {f.name: to_container(f.default) for f in found if ADDED in f.metadata}
