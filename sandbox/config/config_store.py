"""Entries of Hydra's ConfigStore for plugins; an entry is built when Hydra loads it.

Building all entries takes longer than composing a configuration, and a command uses a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf


class LaterNode(ConfigNode):
    """A ConfigNode whose `node`, a structured config, is built at its first use."""

    def __init__(
        self, name: str, make: Callable[[], Any], group: str, package: str | None, provider: str
    ) -> None:
        self.name, self.make, self.group = name, make, group
        self.package, self.provider = package, provider

    def __getattr__(self, name: str) -> Any:
        if name != "node":
            raise AttributeError(name, name=name, obj=self)
        self.node = OmegaConf.structured(self.make())
        return self.node

    def __reduce__(self) -> Any:
        """As a ConfigNode: launchers send the ConfigStore to processes without our plugins."""
        return ConfigNode, (self.name, self.node, self.group, self.package, self.provider)

    def __deepcopy__(self, memo: dict[int, Any]) -> LaterNode:
        """Itself: Hydra copies the store for each composition, and `node` again when it loads."""
        return self

    def __copy__(self) -> ConfigNode:
        return ConfigNode(self.name, self.node, self.group, self.package, self.provider)


def put(group: str, name: str, make: Callable[[], Any], package: str | None, provider: str) -> None:
    """Stores the option `group=name`, the dataclass instance that `make` returns."""
    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.setdefault(part, {})
    node[f"{name}.yaml"] = LaterNode(f"{name}.yaml", make, group, package, provider)


def remove(group: str, name: str) -> None:
    """Removes an option that an earlier version of a now broken file stored."""
    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.get(part, {})
    node.pop(f"{name}.yaml", None)
