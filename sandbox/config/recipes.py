"""Recipes: the settings in a recipe apply only to the options that the recipe chooses.

`conf/experiment/NAME.yaml` chooses the option of each group and gives its settings inline. If the
command line chooses another option (`experiment=NAME backbone=dit`), the loader omits the recipe's
settings of that group, so that settings of two components never mix.

A config source cannot do this: Hydra does not pass it the overrides, and launchers such as joblib
and submitit compose in their own processes. The loader receives the overrides of each composition,
keeps no state between compositions, and is pickled with a launcher's context.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import Overrides, create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, open_dict

from sandbox.config.overrides import parse
from sandbox.config.registry import SEVERAL
from sandbox.config.yaml_files import FileConfigSource

# What Hydra itself chooses under `hydra` in our primary configuration
OF_HYDRA = {
    "hydra/config", "hydra/hydra_logging/none", "hydra/job_logging/none", "hydra/launcher/basic",
    "hydra/sweeper/basic", "hydra/output/default", "hydra/help/default",
    "hydra/hydra_help/default", "hydra/env/default",
}  # fmt: skip
RECIPE = "config_path=experiment/"  # prefix of recipes in the cache of Hydra's repository

log = logging.getLogger(__name__)


def hydra(conf: Path, groups: Collection[str]) -> Hydra:
    """Hydra for the YAML files below `conf`; `groups`: the config groups of a recipe."""
    from hydra import version

    version.setbase("1.3")
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource
    return Hydra("sandbox", RecipeLoader(create_config_search_path(str(conf)), groups))


def shown(cfg: DictConfig) -> Hydra:
    """Hydra for `show_cfg` of a configuration that is composed already."""
    hydra = Hydra("sandbox", RecipeLoader(ConfigSearchPathImpl(), ()))
    hydra.compose_config = lambda *_, **__: cfg
    return hydra


class RecipeLoader(ConfigLoaderImpl):
    """Hydra's loader without a recipe's settings of groups whose option was swapped."""

    def __init__(self, search_path: ConfigSearchPath, groups: Collection[str]) -> None:
        super().__init__(search_path)
        self.groups = tuple(groups)
        self.recipe: str | None = None
        self.omitted: list[str] = []  # groups that the last command line swapped
        self.may_set_hydra = True  # whether a preset or recipe of it may set anything under `hydra`

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        parsed, repo = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        dropped: list[str] = []
        self.recipe = None
        if _may_have_recipe(repo, config_name, parsed):
            final = _choices(repo, config_name, parsed)
            self.recipe = final.known_choices.get("experiment")
            dropped += _drop(repo, config_name, final, self.groups) if self.recipe else ()
        named = {override.key_or_group for override in parsed}
        self.omitted = [name for name in dropped if name.partition(".")[0] in named]
        return parsed, repo

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        self.may_set_hydra = any(_may_set_hydra(default, repo) for default in defaults)
        return super()._compose_config_from_defaults_list(defaults, repo)

    def report(self) -> None:
        """Logs one line with the groups whose settings were omitted from the recipe.

        Not for the task: another task has other settings, and nobody expects those of the recipe.
        """
        if groups := ", ".join(dict.fromkeys(g for g in self.omitted if g != "task")):
            _log_once(f"experiment={self.recipe}: its settings of {groups} are omitted, because "
                      "another option is chosen")  # fmt: skip


def _may_set_hydra(default: ResultDefault, repo: IConfigRepository) -> bool:
    """Whether a file other than the primary configuration has a place under `hydra`.

    False only where none can have one; Hydra's own options are those of OF_HYDRA.
    """
    path = default.config_path or ""
    if default.primary or (loaded := repo.load_config(path)) is None:
        return False
    if path in OF_HYDRA and not loaded.path.startswith("file://"):
        return False
    package, config = default.package or "", loaded.config
    has_key = not isinstance(config, DictConfig) or "hydra" in config
    return package.startswith("hydra") or (package in ("", "_global_") and has_key)


@cache
def _log_once(text: str) -> None:
    log.warning(text)


def _may_have_recipe(
    repo: CachingConfigRepository, config_name: str | None, overrides: list[Override]
) -> bool:
    """Whether the command line or the primary configuration chooses a recipe."""
    primary = repo.load_config(config_name) if config_name else None
    defaults = (primary and primary.defaults_list) or ()
    return any(o.key_or_group == "experiment" for o in overrides) or any(
        isinstance(d, GroupDefault) and d.group == "experiment" and d.value for d in defaults
    )


def _choices(
    repo: CachingConfigRepository, config_name: str | None, overrides: list[Override]
) -> Overrides:
    return create_defaults_list(repo, config_name, overrides, True, skip_missing=True).overrides


def _drop(
    repo: CachingConfigRepository, config_name: str | None, final: Overrides, all_: Sequence[str]
) -> Iterator[str]:
    """Removes settings of swapped options from the loaded recipes, and yields their groups."""
    for key in [k for k, v in repo.cache.items() if k.startswith(RECIPE) and v is not None]:
        recipe, config = key.removeprefix(RECIPE), repo.cache[key].config  # type: ignore[union-attr]
        groups = [g for g in all_ if isinstance(config, DictConfig) and config.get(g)]
        if not groups:
            continue
        own = _choices(repo, config_name, [parse(f"experiment='{recipe}'")])
        for group in groups:
            chosen, new = _option(own, group), _option(final, group)
            if group in SEVERAL:
                chosen, new = (_by_plugin(repo, group, names) for names in (chosen, new))
                swapped = [n for n in config[group] if chosen.get(n) != new.get(n)]
                with open_dict(config):
                    for name in swapped:
                        del config[group][name]
                yield from (f"{group}.{name}" for name in swapped)
            elif chosen != new:
                with open_dict(config):
                    del config[group]
                yield group


def _option(overrides: Overrides, group: str) -> Any:
    """The option of a group, a list for groups with several, None for an empty group."""
    if group in overrides.deletions:
        return None
    return overrides.override_choices.get(group, overrides.known_choices.get(group))


def _by_plugin(
    repo: CachingConfigRepository, group: str, options: Sequence[str] | None
) -> dict[str, str]:
    """Plugin -> its chosen option: the plugin itself or a preset of it."""
    return {_plugin(repo, group, option): option for option in options or ()}


def _plugin(repo: CachingConfigRepository, group: str, option: str) -> str:
    loaded = repo.load_config(f"{group}/{option}")
    for default in (loaded and loaded.defaults_list) or ():
        if isinstance(default, ConfigDefault) and default.path and not default.is_self():
            return _plugin(repo, group, default.path)
    return option
