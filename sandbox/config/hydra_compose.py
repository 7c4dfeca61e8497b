"""The calls of Hydra's compose API, with its own errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sandbox.config.discovery import conf_folders
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS


def is_list(override: str) -> bool:
    """Whether it gives a group a list of options."""
    group, _, value = override.partition("=")
    return group in GROUPS and value.startswith("[")


def raw(
    overrides: Sequence[str],
    config: str = "config",
    config_dir: str | None = None,
    report: bool = False,
) -> Any:
    """What Hydra composes, with its own errors; with `report`, logs what a recipe leaves out."""
    from hydra.types import RunMode

    from sandbox.config import recipes

    hydra = recipes.hydra(CONF, GROUPS)
    overrides = [*overrides, *search_path(overrides, config_dir)]
    cfg = hydra.compose_config(config, overrides, RunMode.RUN, from_shell=False)
    if report:
        hydra.config_loader.report()  # type: ignore[attr-defined]
    return cfg


def search_path(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The override that adds further folders of YAML files to Hydra's search path."""
    found = conf_folders(overrides, config_dir)[1:]
    return ["hydra.searchpath=[" + ",".join(f"'file://{p}'" for p in found) + "]"] if found else []
