"""Settings that joined a Config later (`contracts.added`): hashes and records of older runs stay.

Both functions take plain containers, in which a dict with `plugin` has that plugin's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from sandbox.config import registry
from sandbox.config.root import ADDED_GROUPS, Root, to_container
from sandbox.contracts import ADDED, PluginError


def without_added(node: Any) -> Any:
    """`node` without added settings that have their default: what hashes and protocols count."""
    if isinstance(node, Mapping):
        new = _added_groups(node) | {f.name: to_container(f.default) for f in _added(node)}
        return {k: without_added(v) for k, v in node.items() if k not in new or v != new[k]}
    return [*map(without_added, node)] if isinstance(node, list | tuple) else node


def with_added(node: Any) -> Any:
    """`node`, recorded by an older version, with the values of added settings that it lacks."""
    if isinstance(node, Mapping):
        new = {f.name: to_container(f.metadata[ADDED](node)) for f in _added(node)}
        lacking = {k: v for k, v in (_added_groups(node) | new).items() if k not in node}
        return {k: with_added(v) for k, v in {**node, **lacking}.items()}
    return [*map(with_added, node)] if isinstance(node, list | tuple) else node


def _added_groups(node: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of groups that a Root did not have before; empty for another Config."""
    is_root = "recipe" in node and "task" in node
    options = ADDED_GROUPS.items() if is_root else ()
    return {group: name and to_container(registry.default(group, name)) for group, name in options}


def _added(node: Mapping[str, Any]) -> list[Field[Any]]:
    """The added settings of the Config that `node` holds."""
    config: Any = Root if "recipe" in node and "task" in node else None
    if isinstance(key := node.get("plugin"), str) and key:
        try:
            config = registry.find(key).config
        except PluginError:  # the plugin is gone or broken
            return []
    return [f for f in fields(config) if ADDED in f.metadata] if config else []
