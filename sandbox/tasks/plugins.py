"""task=plugins: lists all plugins with file, contract and settings."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sandbox.cli.reference import MADE, pages, settings
from sandbox.config import registry
from sandbox.config.discovery import plugin_folders
from sandbox.config.paths import relative
from sandbox.config.registry import register
from sandbox.config.root import GROUPS
from sandbox.contracts import (
    BackboneConfig,
    Clip,
    ConditioningConfig,
    ConfigError,
    DataConfig,
    FirstStageConfig,
    GuidanceConfig,
    LossConfig,
    LRScheduleConfig,
    MetricConfig,
    PluginConfig,
    SamplerConfig,
    ScheduleConfig,
    TaskConfig,
)

INDENT = 4
MAX_SIZES = 4  # clip sizes per plugin
BROKEN = "BROKEN: "


@register("task", "plugins")
class Plugins:
    """Lists every plugin with its file and its contract."""

    @dataclass
    class Config(TaskConfig):
        """only: list one group; to: write the reference of all groups to this folder (Markdown).

        published: config.json, YAML or folder of a published model: print its components as the
        settings of a recipe.
        """

        needs_torch: ClassVar[bool] = False
        only: str | None = None
        to: str | None = None
        published: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.only is not None and self.to is not None:
                yield f"only={self.only}: to= writes the reference of all groups; keep one"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        if self.cfg.published is not None:
            return print_published(Path(self.cfg.published))
        if self.cfg.to is not None:
            return self.write(Path(self.cfg.to), root.plugins_path)
        groups = [
            *(g for g in GROUPS if g in registry.groups()),
            *(g for g in registry.groups() if g not in GROUPS),
        ]
        if self.cfg.only is not None and self.cfg.only not in groups:
            near = registry.nearest(self.cfg.only, groups)
            raise ConfigError(f"task.only={self.cfg.only!r}: no such group{near}")
        clip = root.data.clips()[0] if root.data is not None else Clip(3, 9, 16, 16)
        found = [p for g in groups if self.cfg.only in (None, g) for p in registry.plugins(g)]
        group, broken = None, []
        for plugin in found:
            if plugin.group != group:
                group = plugin.group
                print(f"\n{group}: {GROUPS[group]}" if group in GROUPS else f"\n{group}")
            lines = list(_description(plugin, clip))
            print("\n".join(lines))
            if any(line.lstrip().startswith(BROKEN) for line in lines):
                broken.append(plugin.key)
        ending = f", {len(broken)} broken: {', '.join(broken)}" if broken else ""
        print(f"\n{len(found)} plugins{ending}")
        return {"plugins": len(found), "broken": broken}

    def write(self, folder: Path, plugins_path: str | None) -> dict[str, Any]:
        """Writes the reference pages and removes outdated ones."""
        from sandbox.storage.atomic import storing

        made = pages(plugin_folders([f"plugins_path={plugins_path}"] if plugins_path else []))
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.md"):
                if old.name not in made and old.read_text(encoding="utf-8").startswith(MADE):
                    old.unlink()
            for name, text in made.items():
                (folder / name).write_text(text, encoding="utf-8")
        print(f"wrote {len(made)} pages to {folder}")
        return {"files": [str(folder / name) for name in made]}


def print_published(path: Path) -> dict[str, Any]:
    """Prints the components of a published configuration as a recipe in YAML; returns them."""
    import yaml

    from sandbox.config.root import to_container
    from sandbox.weights.released_configs import components

    found = {group: to_container(config) for group, config in components(path).items()}
    names = {group: settings.pop("plugin").rpartition("/")[2] for group, settings in found.items()}
    override = [{f"override /{group}": name} for group, name in names.items()]
    recipe = {"defaults": override, **found}
    print("# @package _global_\n" + yaml.safe_dump(recipe, sort_keys=False), end="")
    return {"components": {f"{group}={names[group]}": found[group] for group in found}}


def _description(plugin: registry.Plugin, clip: Clip) -> Iterator[str]:
    """Name, file, description, contract and settings, or the reason why it cannot be read."""
    yield f"  {plugin.name}  ({relative(plugin.path) if plugin.path else 'registered by code'})"
    if plugin.config is None:
        yield from _wrapped(f"{BROKEN}{plugin.error}")
        return
    yield from _wrapped(plugin.doc)
    try:
        contract = list(_contract(plugin.config(plugin=plugin.key), clip))
    except Exception as e:  # the plugin's own code may raise anything
        contract = [f"{BROKEN}its Config raises {type(e).__name__}: {e}"]
    if contract:
        yield from _wrapped("; ".join(contract))
    if names := ", ".join(settings(plugin.config())):
        yield from _wrapped(f"settings: {names}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        116,
        initial_indent=" " * INDENT,
        subsequent_indent=" " * (INDENT + 2),
        break_on_hyphens=False,
    )


# --- contracts: what the default Config promises, by kind -----------------------------------------


def _contract(cfg: PluginConfig, clip: Clip) -> Iterator[str]:
    for kind, answers in CONTRACTS.items():
        if isinstance(cfg, kind):
            yield from answers(cfg, clip)


def _task(cfg: TaskConfig, clip: Clip) -> Iterator[str]:
    yield "uses an earlier run" if cfg.uses_run() else "uses the configuration"
    if not cfg.needs_torch:
        yield "does not import torch"


def _data(cfg: DataConfig, clip: Clip) -> Iterator[str]:
    sizes = [*map(str, cfg.clips())]
    more = f" and {len(sizes) - MAX_SIZES} other sizes" if len(sizes) > MAX_SIZES else ""
    yield f"clips of {', '.join(sizes[:MAX_SIZES])}{more}"
    yield f"provides {_list(cfg.provides())}"
    yield f"metric={cfg.metric() or 'null'}"


FITTED = {"none": "has no weights", "closed_form": "is fitted in closed form"}


def _first_stage(cfg: FirstStageConfig, clip: Clip) -> Iterator[str]:
    try:
        yield f"clips of {clip} become latents of {cfg.latents(clip)}"
    except ConfigError as e:
        yield f"clips of {clip} are not supported ({e})"
    yield FITTED.get(cfg.fitted(), f"is trained with reconstruction={cfg.regularizer()}")


def _backbone(cfg: BackboneConfig, clip: Clip) -> Iterator[str]:
    yield f"takes {_list(cfg.takes())}"
    if cfg.needs():
        yield f"requires {_list(cfg.needs())}"


def _conditioning(cfg: ConditioningConfig, clip: Clip) -> Iterator[str]:
    yield f"reads {_list(cfg.needs())}"
    yield f"offers {_list(cfg.offers(clip, clip).names())}"
    yield f"can drop {_list(cfg.signals())}"
    if cfg.encodes():
        yield "uses the first stage in training"


def _schedule(cfg: ScheduleConfig, clip: Clip) -> Iterator[str]:
    yield f"{cfg.kind} times"
    yield f"predicts {cfg.predicts()}"
    yield "zero terminal SNR" if cfg.ends_in_noise() else "nonzero terminal SNR"


def _with_schedule(cfg: Any, clip: Clip) -> Iterator[str]:
    known = [p for p in registry.plugins("schedule") if p.config]
    names = [p.name for p in known if not list(cfg.accepts(registry.default("schedule", p.name)))]
    yield f"works with schedule={' or '.join(names) or 'none with default settings'}"


def _guidance(cfg: GuidanceConfig, clip: Clip) -> Iterator[str]:
    passes = len(cfg.passes(("text",)))
    yield "one forward pass" if passes == 1 else f"{passes} forward passes if text can be dropped"


def _lr_schedule(cfg: LRScheduleConfig, clip: Clip) -> Iterator[str]:
    first, middle, last = (cfg.factor(step, 1000) for step in (0, 500, 999))
    yield f"factors at steps 0, 500 and 999 of 1000: {first:.2g}, {middle:.2g}, {last:.2g}"


def _metric(cfg: MetricConfig, clip: Clip) -> Iterator[str]:
    yield f"needs data with {_list(cfg.needs())}"


CONTRACTS: dict[type, Callable[[Any, Clip], Iterator[str]]] = {
    TaskConfig: _task,
    DataConfig: _data,
    FirstStageConfig: _first_stage,
    BackboneConfig: _backbone,
    ConditioningConfig: _conditioning,
    ScheduleConfig: _schedule,
    LossConfig: _with_schedule,
    SamplerConfig: _with_schedule,
    GuidanceConfig: _guidance,
    LRScheduleConfig: _lr_schedule,
    MetricConfig: _metric,
}


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
