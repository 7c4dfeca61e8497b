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


def raw(overrides: Sequence[str], config: str = "config", config_dir: str | None = None) -> Any:
    """What Hydra composes, with its own errors."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    overrides = [*overrides, *search_path(overrides, config_dir)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), job_name="sandbox", version_base="1.3"):
        return hydra_compose(config, overrides, return_hydra_config=True)


def search_path(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The override that adds further folders of YAML files to Hydra's search path."""
    found = conf_folders(overrides, config_dir)[1:]
    return ["hydra.searchpath=[" + ",".join(f"'file://{p}'" for p in found) + "]"] if found else []
