"""Nothing that is composed may run code: what is refused before Hydra starts.

Hydra follows `_target_` (its launchers, sweepers and callbacks are made that way) and logging
configurations may name any callable. Recipes and presets may be somebody else's, so nothing but
the command line sets anything under `hydra`, and there only what Hydra itself brings is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sandbox.contracts import ConfigError

CALLED = ("_target_", "()")  # keys whose value Hydra, or the logging module, would call
FOLLOWED = {  # what Hydra may make, and where that must come from
    "launcher._target_": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "sweeper._target_": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "sweeper.sampler._target_": ("optuna.samplers.",),
}
OF_A_JOB = ("overrides", "runtime", "searchpath")  # entries under hydra that differ by nature


def refuse_code(overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override that names code, or where files are looked for."""
    problems = []
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        if "_target_" in override:
            problems.append(
                f"{name}: _target_ runs code and is not used here; choose a plugin by its name"
            )
        if name == "hydra.searchpath":
            problems.append(f"{name}: use --config-dir DIR, or plugins_path=DIR with a conf/ in it")
    if problems:
        raise ConfigError(*problems)


def check(cfg: Any, overrides: Sequence[str], config: str, config_dir: str | None) -> None:
    """Raises ConfigError for code in a composed configuration, and for recipes that set `hydra`."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    hydra = plain.pop("hydra", {})
    problems = [
        f"{path}: {path.rpartition('.')[2]} runs code and is not used here; "
        "choose a plugin by its name"
        for path, _ in _calls(plain)
    ]
    for path, target in _calls(hydra):
        if not str(target).startswith(FOLLOWED.get(path, ("\0",))):
            problems.append(
                f"hydra.{path}={target}: runs code that Hydra does not bring; choose a launcher "
                "by its name, such as hydra/launcher=joblib"
            )
    about = ("hydra.", "hydra/", "plugins_path=")
    own = tuple(o for o in overrides if o.lstrip("+~").startswith(about))
    for path in _differences(_without_recipes(own, config, config_dir), _settings(hydra)):
        problems.append(
            f"hydra.{path}: {_culprits(hydra)} sets it; only the command line may set anything "
            "under hydra"
        )
    if problems:
        raise ConfigError(*problems)


@cache
def _without_recipes(own: tuple[str, ...], config: str, config_dir: str | None) -> dict[str, Any]:
    """What stands under `hydra` with the overrides of the command line that are about it alone."""
    from omegaconf import OmegaConf

    from sandbox.config.hydra_compose import raw

    plain = OmegaConf.to_container(raw(own, config, config_dir).hydra, resolve=False)
    assert isinstance(plain, dict)
    return _settings(plain)


def _settings(hydra: dict[Any, Any]) -> dict[Any, Any]:
    found = {k: v for k, v in hydra.items() if k not in OF_A_JOB}
    found["job"] = {k: v for k, v in hydra["job"].items() if k != "override_dirname"}
    return found


def _calls(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key that something would call."""
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node if isinstance(node, list) else ())
    )
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if key in CALLED:
            yield here, value
        yield from _calls(value, here)


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Paths of the smallest parts that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            here = f"{path}.{key}" if path else str(key)
            yield from _differences(a.get(key, ...), b.get(key, ...), here)
    elif a != b:
        yield path


def _culprits(hydra: dict[Any, Any]) -> str:
    """The chosen YAML files that say something about hydra."""
    sources = [s for s in hydra["runtime"]["config_sources"] if s["schema"] == "file"]
    folders = [Path(s["path"]) for s in sources]
    found = []
    for group, chosen in hydra["runtime"]["choices"].items():
        for name in [chosen] if isinstance(chosen, str) else chosen or ():
            for path in (Path(f, group, f"{name}.yaml") for f in folders):
                if path.is_file() and "hydra" in path.read_text(encoding="utf-8"):
                    found.append(f"{group}={name} ({path})")
    return ", ".join(found) or "a recipe or preset"
