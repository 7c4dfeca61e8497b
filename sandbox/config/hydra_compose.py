"""Hydra's compose API; its exceptions are not translated here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sandbox.config.discovery import conf_folders
from sandbox.config.overrides import value
from sandbox.config.paths import CONF
from sandbox.config.root import GROUPS


def is_option_list(override: str) -> bool:
    """Whether an override gives a group a list of options."""
    return override.partition("=")[0] in GROUPS and value(override).startswith("[")


def errors() -> tuple[type[Exception], ...]:
    """What `compose_raw` raises for an invalid command line, preset or recipe."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError


def compose_raw(
    overrides: Sequence[str], config: str = "config", config_dir: str | None = None
) -> Any:
    """The DictConfig that Hydra composes."""
    return _composed(overrides, config, config_dir)[0]


def compose_reported(
    overrides: Sequence[str], config: str, config_dir: str | None
) -> tuple[Any, bool]:
    """As `compose_raw`, and whether a preset or recipe may set anything under `hydra`.

    Logs the settings omitted from a recipe.
    """
    cfg, loader = _composed(overrides, config, config_dir)
    loader.report()
    return cfg, loader.may_set_hydra or any("hydra" in o for o in overrides)


def _composed(overrides: Sequence[str], config: str, config_dir: str | None) -> tuple[Any, Any]:
    """The DictConfig and the loader that composed it."""
    from hydra.types import RunMode

    from sandbox.config import recipes

    hydra = recipes.hydra(CONF, GROUPS)
    overrides = [*overrides, *search_path(overrides, config_dir)]
    cfg = hydra.compose_config(config, overrides, RunMode.RUN, from_shell=False)
    return cfg, hydra.config_loader


def search_path(overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The override that adds further YAML folders to Hydra's search path; empty without any."""
    found = conf_folders(overrides, config_dir)[1:]
    return ["hydra.searchpath=[" + ",".join(f"'file://{p}'" for p in found) + "]"] if found else []
