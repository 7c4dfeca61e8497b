"""task=plugins: what is there, from which file, and what each component promises."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from sandbox.cli.reference import shown_value
from sandbox.config import registry
from sandbox.config.registry import register
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
SHOWN = 4  # sizes of clips
BROKEN = "BROKEN: "


@register("task", "plugins")
class Plugins:
    """Lists every plugin with its file and its contract."""

    @dataclass
    class Config(TaskConfig):
        """only: a group, for that one alone; to: a folder, which gets the reference of all groups
        as Markdown (docs/reference is made so).
        """

        needs_torch: ClassVar[bool] = False
        only: str | None = None
        to: str | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            if self.only is not None and self.to is not None:
                yield f"only={self.only}: to= takes the reference of all groups; keep one"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        from sandbox.config.root import GROUPS

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
            lines = list(described(plugin, clip))
            print("\n".join(lines))
            if any(line.lstrip().startswith(BROKEN) for line in lines):
                broken.append(plugin.key)
        ending = f", {len(broken)} broken: {', '.join(broken)}" if broken else ""
        print(f"\n{len(found)} plugins{ending}")
        return {"plugins": len(found), "broken": broken}

    def write(self, folder: Path, plugins_path: str | None) -> dict[str, Any]:
        """The reference as files, in place of those of an earlier one."""
        from sandbox.cli.reference import MADE, pages
        from sandbox.config.discovery import plugin_folders
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


def described(plugin: registry.Plugin, clip: Clip) -> Iterator[str]:
    """Name, file, what it is, its contract and its settings; or why it cannot be read."""
    yield f"  {plugin.name}  ({_short(plugin.path)})"
    if plugin.config is None:
        yield from _wrapped(f"{BROKEN}{plugin.error}")
        return
    yield from _wrapped(plugin.doc)
    try:
        said = list(_contract(plugin.config(plugin=plugin.key), clip))
    except Exception as e:  # a plugin's own code: whatever it raises is that plugin's, and is said
        said = [f"{BROKEN}its Config raises {type(e).__name__}: {e}"]
    if said:
        yield from _wrapped("; ".join(said))
    settings = ", ".join(_settings(plugin.config))
    if settings:
        yield from _wrapped(f"settings: {settings}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        116,
        initial_indent=" " * INDENT,
        subsequent_indent=" " * (INDENT + 2),
        break_on_hyphens=False,
    )


def _short(path: Path | None) -> str:
    if path is None:
        return "registered by live code"
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _settings(config: type[PluginConfig]) -> Iterator[str]:
    for f in fields(config):
        if f.name != "plugin":
            value = f.default_factory() if f.default_factory is not MISSING else f.default
            yield f"{f.name}={shown_value(value)}"


# --- contracts: what a Config with its defaults answers, by kind ---------------------------------


def _contract(cfg: PluginConfig, clip: Clip) -> Iterator[str]:
    for kind, answers in CONTRACTS.items():
        if isinstance(cfg, kind):
            yield from answers(cfg, clip)


def _task(cfg: TaskConfig, clip: Clip) -> Iterator[str]:
    yield "works on an earlier run" if cfg.uses_run() else "works on the configuration"
    if not cfg.needs_torch:
        yield "answers at once"


def _data(cfg: DataConfig, clip: Clip) -> Iterator[str]:
    sizes = [*map(str, cfg.clips())]
    more = f" and {len(sizes) - SHOWN} other sizes" if len(sizes) > SHOWN else ""
    yield f"clips of {', '.join(sizes[:SHOWN])}{more}"
    yield f"provides {_list(cfg.provides())}"
    yield f"scored by metric={cfg.metric() or 'null'}"


FITTED = {"none": "has no weights", "closed_form": "is fitted in closed form"}


def _first_stage(cfg: FirstStageConfig, clip: Clip) -> Iterator[str]:
    try:
        yield f"clips of {clip} become latents of {cfg.latents(clip)}"
    except ConfigError as e:
        yield f"clips of {clip} do not fit ({e})"
    yield FITTED.get(cfg.fitted(), f"is trained with reconstruction={cfg.regularizer()}")


def _backbone(cfg: BackboneConfig, clip: Clip) -> Iterator[str]:
    yield f"takes {_list(cfg.takes())}"
    if cfg.needs():
        yield f"cannot do without {_list(cfg.needs())}"


def _conditioning(cfg: ConditioningConfig, clip: Clip) -> Iterator[str]:
    yield f"reads {_list(cfg.needs())}"
    yield f"offers {_list(cfg.offers(clip, clip).names())}"
    yield f"can drop {_list(cfg.signals())}"
    if cfg.encodes():
        yield "uses the first stage while training"


def _schedule(cfg: ScheduleConfig, clip: Clip) -> Iterator[str]:
    yield f"{cfg.kind} times"
    yield f"predicts {cfg.predicts()}"
    yield "ends in pure noise" if cfg.ends_in_noise() else "a trace of the signal stays at the end"


def _with_schedule(cfg: Any, clip: Clip) -> Iterator[str]:
    known = [p for p in registry.plugins("schedule") if p.config]
    works = [p.name for p in known if not list(cfg.accepts(registry.default("schedule", p.name)))]
    yield f"works with schedule={' or '.join(works) or 'none of these defaults'}"


def _guidance(cfg: GuidanceConfig, clip: Clip) -> Iterator[str]:
    passes = len(cfg.passes(("text",)))
    yield "one pass of the model" if passes == 1 else f"{passes} passes where text can be dropped"


def _lr_schedule(cfg: LRScheduleConfig, clip: Clip) -> Iterator[str]:
    first, middle, last = (cfg.factor(step, 1000) for step in (0, 500, 999))
    yield f"of a run of 1000 steps the factors are {first:.2g}, {middle:.2g} and {last:.2g}"


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
