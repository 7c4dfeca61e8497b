"""Composes one configuration from a command line.

Hydra composes and instantiates nothing (`sandbox.config.safety`). `sandbox.config.explain`
translates its errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sandbox.config.discovery import chosen_plugin, setup
from sandbox.config.hydra_compose import compose_raw, errors, is_option_list
from sandbox.config.overrides import key, value, with_quotes
from sandbox.config.registry import SEVERAL
from sandbox.config.root import GROUPS, Root, from_container

HOME = re.compile(r"""(?<=[=,:'"(\[])~(?=/)""")  # the ~ of a value that starts with ~/


def expand(overrides: Sequence[str]) -> list[str]:
    """Translates our shorthands into Hydra overrides.

    - A setting of the chosen task needs no `task.`: `task=new group=vae`, for `task.group=vae`.
    - `logger=null` leaves a group empty, in Hydra `~logger`.
    - A task adds its `default_options` for groups that the command line does not choose.
    - A list that Hydra's grammar refuses is quoted: `prompts=[a (red) cat]`.
    - `~/` at the start of a value is the home folder; shells do not expand it in `name=~/file`.
    """
    overrides = [with_quotes(HOME.sub(_home, o)) for o in overrides]
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
    options = [o for o in plugin.config.default_options if o.partition("=")[0] not in given]  # type: ignore[attr-defined]
    overrides = [f"task.{o}" if o.partition("=")[0] in own else o for o in overrides]
    texts = {f"task.{f.name}" for f in fields(plugin.config) if "tuple[str" in str(f.type)}
    return [with_quotes(o, is_text=True) if key(o) in texts else o for o in overrides] + options


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
        cfg = compose_raw(overrides, config, config_dir, report=True)
    except errors() as e:
        from sandbox.config.explain import explain

        raise explain(e, overrides, config, config_dir) from e
    safety.check(cfg, overrides, config, config_dir)
    return cfg


def received(node: dict[str, Any]) -> Root:
    """A Root from another process; reads plugins first, including those of its `plugins_path`."""
    folder = node.get("plugins_path")
    setup([f"plugins_path={folder}"] if folder else ())
    return from_container(node)
