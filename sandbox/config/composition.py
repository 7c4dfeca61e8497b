"""Composes one configuration from a command line.

Hydra composes and instantiates nothing (`sandbox.config.safety`). `sandbox.config.setting_errors`
translates its errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sandbox.config import registry
from sandbox.config.discovery import chosen_plugin, conf_folders, options, setup
from sandbox.config.hydra_compose import compose_reported, errors, is_option_list
from sandbox.config.overrides import is_valid, key, parse, value, with_quotes
from sandbox.config.registry import SEVERAL
from sandbox.config.root import GROUPS, Root, from_container
from sandbox.config.secrets import remember
from sandbox.contracts import ConfigError

HOME = re.compile(r"""(?<=[=,:'"(\[])~(?=/)""")  # the ~ of a value that starts with ~/


def expand_shorthands(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Translates our shorthands into Hydra overrides.

    - A setting of the chosen task needs no `task.`: `task=new group=vae`, for `task.group=vae`.
    - `logger=null` leaves a group empty, in Hydra `~logger`.
    - A task adds its `default_options` for groups that the command line does not choose.
    - A list that Hydra's grammar refuses is quoted: `prompts=[a (red) cat]`.
    - `backbone=glob(dit_*)` sweeps over the options that match, as in Hydra.
    - `~/` at the start of a value is the home folder; shells do not expand it in `name=~/file`.
    """
    overrides = [with_quotes(HOME.sub(_home, o)) for o in overrides]
    overrides = [_listed(o, overrides, config_dir) if "=glob(" in o else o for o in overrides]
    empty = {f"{group}=null": f"~{group}" for group in GROUPS}
    for group in SEVERAL:
        empty |= dict.fromkeys((f"{group}=null", f"~{group}"), f"{group}=[]")
    overrides = [empty.get(o, o) for o in overrides]
    task = next((value(o) for o in overrides if o.startswith("task=")), "train")
    plugin = chosen_plugin("task", task)
    if plugin is None or plugin.config is None:
        return overrides
    own = {f.name for f in fields(plugin.config)} - {f.name for f in fields(Root)}
    given = {o.partition("=")[0] for o in overrides}
    defaults = [o for o in plugin.config.default_options if o.partition("=")[0] not in given]  # type: ignore[attr-defined]
    overrides = [f"task.{o}" if o.partition("=")[0] in own else o for o in overrides]
    texts = {f"task.{f.name}" for f in fields(plugin.config) if "tuple[str" in str(f.type)}
    return [with_quotes(o, is_text=True) if key(o) in texts else o for o in overrides] + defaults


def _listed(override: str, overrides: Sequence[str], config_dir: str | None) -> str:
    """A sweep over a group's options that match a pattern, as a list. Raises ConfigError."""
    if not is_valid(override):
        return override
    group, known = key(override), options(key(override), conf_folders(overrides, config_dir))
    if not known:
        raise ConfigError(f"{override}: glob(...) matches options of a group; want a list: 1,2")
    if not (found := parse(override).value().filter(known)):
        raise ConfigError(f"{override}: no such option of {group}{registry.nearest('', known)}")
    return f"{override.partition('=')[0]}={','.join(found)}"


def _home(found: re.Match[str]) -> str:
    return os.path.expanduser("~")


def compose(
    overrides: Sequence[str] = (), config: str = "config", config_dir: str | None = None
) -> Any:
    """The composed DictConfig of one job, checked for safety.

    Raises PluginError, or ConfigError with every problem that can be found, wiring included.
    """
    from sandbox.config import safety

    safety.refuse_code(overrides)
    try:
        if any(is_option_list(o) and o.partition("=")[0] not in SEVERAL for o in overrides):
            raise ValueError("a list of options")  # Hydra would merge them
        folders = conf_folders(overrides, config_dir)
        if any(_is_unknown_option(o, folders) for o in overrides):
            raise ValueError("an unknown option")  # known without composing
        cfg, may_set_hydra = compose_reported(overrides, config, config_dir)
    except errors() as e:
        from sandbox.config.setting_errors import explain

        raise explain(e, overrides, config, config_dir) from e
    except RecursionError as e:
        from sandbox.config.setting_errors import explain_cycle

        raise explain_cycle(overrides, config_dir) from e
    settings = safety.plain(cfg)
    safety.check(settings, may_set_hydra, overrides, config, config_dir)
    remember(settings)
    return cfg


def _is_unknown_option(override: str, folders: Sequence[Path]) -> bool:
    """Whether an override certainly chooses an option that its group lacks."""
    name, _, chosen = override.partition("=")
    if name not in GROUPS or not re.fullmatch(r"[A-Za-z]\w*", chosen) or chosen == "null":
        return False
    return chosen not in options(name, folders)


def receive_root(node: dict[str, Any]) -> Root:
    """A Root from another process; reads plugins first, including those of its `plugins_path`."""
    remember(node)
    folder = node.get("plugins_path")
    setup([f"plugins_path={folder}"] if folder else (), report=False)
    return from_container(node)
