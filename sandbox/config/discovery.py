"""Finds plugins and presets: those of the project, of plugin folders and of entry points."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sandbox.config import registry
from sandbox.config.overrides import value
from sandbox.config.paths import CHECKOUT, CONF, PLUGINS
from sandbox.config.root import Root
from sandbox.contracts import ConfigError, PluginError

log = logging.getLogger(__name__)


def setup(overrides: Sequence[str] = (), report: bool = True) -> None:
    """Reads all plugins: the project's, those of entry points, `plugins_path=` and SANDBOX_PLUGINS.

    Fast, and repeatable. `report`: logs each broken plugin that `overrides` do not choose, once.
    Raises PluginError for two plugins or presets with the same name.
    """
    from hydra.core.config_store import ConfigStore

    registry.discover(CHECKOUT / "sandbox" / "tasks", "sandbox.tasks", group="task")
    registry.discover(PLUGINS, "plugins")
    registry.discover_entry_points()
    for folder in plugin_folders(overrides):
        registry.discover(folder, None)
    ConfigStore.instance().store("root", Root)
    _check_presets(conf_folders(overrides))
    chosen = {o.replace("=", "/", 1) for o in overrides}
    for plugin in registry.plugins() if report else ():
        if plugin.error and plugin.key not in chosen:
            _log_once(f"{plugin.group}={plugin.name} is left out: {plugin.error}")


@cache
def _log_once(text: str) -> None:
    log.warning(text)


def plugin_folders(overrides: Sequence[str]) -> list[Path]:
    """Plugin folders outside the project: `plugins_path=DIR`, SANDBOX_PLUGINS (A:B)."""
    given = [value(o).strip("'\"") for o in overrides if o.startswith("plugins_path=")]
    named = [("plugins_path", v) for v in given if v and v != "null"]
    listed = os.environ.get("SANDBOX_PLUGINS", "").split(os.pathsep)
    named += [("SANDBOX_PLUGINS", v) for v in listed if v]
    for name, folder in named:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(
                f"{name}={folder}: no such folder; name one that holds GROUP/NAME.py files"
            )
    return list(dict.fromkeys(Path(v).expanduser().resolve() for _, v in named))


def conf_folders(overrides: Sequence[str], config_dir: str | None = None) -> list[Path]:
    """Folders of YAML files: the project's conf/, those of plugin folders, --config-dir."""
    found = [CONF, *(f / "conf" for f in plugin_folders(overrides) if (f / "conf").is_dir())]
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    return found + ([Path(config_dir).resolve()] if config_dir else [])


def _check_presets(folders: Sequence[Path]) -> None:
    """Raises PluginError for a preset that hides a plugin or another preset."""
    seen: dict[Path, Path] = {}
    plugins = {plugin.key for plugin in registry.plugins()}
    for folder in folders:
        for path in sorted(folder.glob("*/**/*.yaml")):
            name = path.relative_to(folder)
            if name.with_suffix("").as_posix() in plugins:
                raise PluginError(f"{path}: has the name of a plugin and would hide it; rename it")
            if name in seen:
                raise PluginError(
                    f"preset {name.with_suffix('')} exists twice: in {seen[name]} and in {path}; "
                    "rename or remove one"
                )
            seen[name] = path


def options(group: str, folders: Sequence[Path] = (CONF,)) -> list[str]:
    """Names that `group=` accepts: plugins, presets below `folders`, and options of Hydra."""
    from hydra.core.config_store import ConfigStore

    node: Any = ConfigStore.instance().repo
    for part in group.split("/"):
        node = node.get(part, {}) if isinstance(node, dict) else {}
    names = {str(k).removesuffix(".yaml") for k, v in node.items() if not isinstance(v, dict)}
    files = [p for f in folders for p in (f / group).glob("*.yaml") if p.is_file()]
    return sorted(names | {p.stem for p in files})


def chosen_plugin(group: str, name: str) -> registry.Plugin | None:
    """The plugin behind `group=name`, which may be a preset of the project."""
    import yaml

    preset = CONF / group / f"{name}.yaml"
    if preset.is_file():
        defaults = yaml.safe_load(preset.read_text()).get("defaults", ())
        name = next((d for d in defaults if isinstance(d, str) and d != "_self_"), name)
    return next((p for p in registry.plugins(group) if p.name == name), None)
