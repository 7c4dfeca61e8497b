"""From a command line to one composed configuration.

Hydra composes and instantiates nothing (`sandbox.config.safety`). Its errors are explained by
`sandbox.config.explain`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sandbox.config.discovery import chosen_plugin, setup
from sandbox.config.hydra_compose import is_list, raw
from sandbox.config.registry import SEVERAL
from sandbox.config.root import GROUPS, Root, from_container

AT_HOME = re.compile(r"""(?<=[=,:'"(\[])~(?=/)""")  # of an override: where a value starts with ~/


def expand(overrides: Sequence[str]) -> list[str]:
    """Shorthands of ours, in Hydra's words.

    A setting of the chosen task may be given without `task.`: `task=new group=vae` is
    `task=new task.group=vae`. `logger=null` leaves a group empty, which Hydra writes `~logger`. A
    task that brings options of a group brings them where the line names none. A value that starts
    with `~/` is below the home folder, which a shell says of `name=~/file` only in an assignment.
    """
    overrides = [AT_HOME.sub(lambda _: os.path.expanduser("~"), o) for o in overrides]
    empty = {f"{group}=null": f"~{group}" for group in GROUPS}
    for group in SEVERAL:
        empty |= dict.fromkeys((f"{group}=null", f"~{group}"), f"{group}=[]")
    overrides = [empty.get(o, o) for o in overrides]
    chosen = next((o.partition("=")[2] for o in overrides if o.startswith("task=")), "train")
    plugin = chosen_plugin("task", chosen)
    if plugin is None or plugin.config is None:
        return overrides
    own = {f.name for f in fields(plugin.config)} - {f.name for f in fields(Root)}
    named = {o.partition("=")[0] for o in overrides}
    brought = [b for b in plugin.config.default_options if b.partition("=")[0] not in named]  # type: ignore[attr-defined]
    return [f"task.{o}" if o.partition("=")[0] in own else o for o in overrides] + brought


# --- composition ----------------------------------------------------------------------------------


def compose(
    overrides: Sequence[str] = (), config: str = "config", config_dir: str | None = None
) -> Any:
    """The composed DictConfig of one job, checked for safety.

    Raises ConfigError or PluginError; where Hydra cannot compose, with every problem that can be
    found without it, those of the wiring included.
    """
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sandbox.config import safety

    safety.refuse_code(overrides)
    try:
        if any(is_list(o) and o.partition("=")[0] not in SEVERAL for o in overrides):
            raise ValueError("a list of options")  # Hydra would merge them into one
        cfg = raw(overrides, config, config_dir, report=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as e:
        from sandbox.config.explain import explain

        raise explain(e, overrides, config, config_dir) from e
    safety.check(cfg, overrides, config, config_dir)
    return cfg


def received(node: dict[str, Any]) -> Root:
    """A Root from another process; plugins, also those of its `plugins_path`, are read first."""
    folder = node.get("plugins_path")
    setup([f"plugins_path={folder}"] if folder else ())
    return from_container(node)
