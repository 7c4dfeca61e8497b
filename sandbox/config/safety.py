"""Rejects configurations that would run code.

Hydra instantiates `_target_` (launchers, sweepers, callbacks), and logging configurations may name
any callable. Recipes and presets may come from untrusted sources. So only the command line may set
anything under `hydra`, and only Hydra's own classes are instantiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sandbox.config.overrides import key
from sandbox.contracts import ConfigError

CALL_KEYS = ("_target_", "()")  # keys whose value Hydra, or the logging module, calls
ALLOWED = {  # setting of Hydra -> the modules that its class may come from
    "launcher._target_": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "sweeper._target_": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "sweeper.sampler._target_": ("optuna.samplers.",),
}
RUNS_CODE = "runs code and is not allowed; choose a plugin by its name"
OF_A_JOB = ("overrides", "runtime", "searchpath")  # entries under hydra that differ between jobs


def refuse_code(overrides: Sequence[str]) -> None:
    """Raises ConfigError for overrides that name code or set Hydra's search path."""
    problems = []
    for override in overrides:
        name = key(override)
        if "_target_" in override:
            problems.append(f"{name}: _target_ {RUNS_CODE}")
        if name == "hydra.searchpath":
            problems.append(f"{name}: use --config-dir DIR, or plugins_path=DIR with a conf/ in it")
    if problems:
        raise ConfigError(*problems)


def check(
    cfg: dict[Any, Any],
    may_set_hydra: bool,
    overrides: Sequence[str],
    config: str,
    config_dir: str | None,
) -> None:
    """Raises ConfigError for code in a composed configuration, and for recipes that set `hydra`.

    `cfg`: plain containers. `may_set_hydra`: whether a recipe or preset may have done so; only then
    the settings under `hydra` are composed again without recipes, for comparison.
    """
    settings = {k: v for k, v in cfg.items() if k != "hydra"}
    hydra = cfg.get("hydra", {})
    problems = [f"{path}: {path.rpartition('.')[2]} {RUNS_CODE}" for path, _ in _calls(settings)]
    problems += [
        f"hydra.{path}={target}: runs code from outside Hydra; choose a launcher by its name, such "
        "as hydra/launcher=joblib"
        for path, target in _calls(hydra)
        if not str(target).startswith(ALLOWED.get(path, ("\0",)))
    ]
    of_hydra = ("hydra.", "hydra/", "plugins_path=")
    own = tuple(o for o in overrides if o.lstrip("+~").startswith(of_hydra))
    problems += [
        f"hydra.{path}: set by {_files_with_hydra(hydra)}; only the command line may set anything "
        "under hydra"
        for path in (
            _differences(_without_recipes(own, config, config_dir), _settings(hydra))
            if may_set_hydra
            else ()
        )
    ]
    if problems:
        raise ConfigError(*problems)


def plain(cfg: Any) -> dict[Any, Any]:
    """A composed configuration as plain containers, with its interpolations."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(found, dict)
    return found


@cache
def _without_recipes(own: tuple[str, ...], config: str, config_dir: str | None) -> dict[str, Any]:
    """The settings under `hydra` with only the overrides `own`, which set it or add plugins."""
    from sandbox.config.hydra_compose import compose_raw

    return _settings(plain(compose_raw(own, config, config_dir).hydra))


def _settings(hydra: dict[Any, Any]) -> dict[Any, Any]:
    job = {k: v for k, v in hydra["job"].items() if k != "override_dirname"}
    return {k: v for k, v in hydra.items() if k not in OF_A_JOB} | {"job": job}


def _calls(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key whose value would be called."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        full = f"{path}.{name}" if path else str(name)
        if name in CALL_KEYS:
            yield full, value
        if isinstance(value, dict | list):
            yield from _calls(value, full)


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths of the smallest parts that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {**a, **b}:
            full = f"{path}.{name}" if path else str(name)
            yield from _differences(a.get(name, ...), b.get(name, ...), full)
    elif a != b:
        yield path


def _files_with_hydra(hydra: dict[Any, Any]) -> str:
    """The chosen YAML files that contain the word hydra."""
    sources = hydra["runtime"]["config_sources"]
    folders = [s["path"] for s in sources if s["schema"] == "file"]
    found = []
    for group, chosen in hydra["runtime"]["choices"].items():
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            for path in (Path(f, group, f"{name}.yaml") for f in folders):
                if path.is_file() and "hydra" in path.read_text(encoding="utf-8"):
                    found.append(f"{group}={name} ({path})")
    return ", ".join(found) or "a recipe or preset"
