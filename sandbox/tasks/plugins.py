"""task=plugins: lists all plugins with file, contract and settings."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sandbox.cli.reference import MADE, pages, settings
from sandbox.config import registry
from sandbox.config.discovery import plugin_folders
from sandbox.config.paths import relative
from sandbox.config.registry import register
from sandbox.config.root import GROUPS
from sandbox.contracts import Clip, ConfigError, FirstStageConfig, TaskConfig
from sandbox.reports.pages import render

WRAPPER = textwrap.TextWrapper(
    116, initial_indent=" " * 4, subsequent_indent=" " * 6, break_on_hyphens=False
)
BROKEN = "BROKEN: "


@register("task", "plugins")
@dataclass
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
            if self.only is not None and self.to is not None:
                yield f"only={self.only}: to= writes the reference of all groups; keep one"

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        if self.cfg.published is not None:
            return print_published(Path(self.cfg.published))
        if self.cfg.to is not None:
            return self.write(Path(self.cfg.to), root.plugins_path)
        groups = [g for g in (GROUPS | dict.fromkeys(registry.groups())) if registry.plugins(g)]
        if self.cfg.only is not None and self.cfg.only not in groups:
            near = registry.nearest(self.cfg.only, groups)
            raise ConfigError(f"task.only={self.cfg.only!r}: no such group{near}")
        clip = root.data.clips()[0] if root.data is not None else Clip(3, 9, 16, 16)
        shown = {g: registry.plugins(g) for g in groups if self.cfg.only in (None, g)}
        broken = []
        for group, plugins in shown.items():
            print(f"\n{group}: {GROUPS[group]}" if group in GROUPS else f"\n{group}")
            for plugin in plugins:
                text = "\n".join(_description(plugin, clip))
                print(text)
                broken += [plugin.key] if BROKEN in text else []
        count = sum(map(len, shown.values()))
        ending = f", {len(broken)} broken: {', '.join(broken)}" if broken else ""
        print(f"\n{count} plugins{ending}")
        return {"plugins": count, "broken": broken}

    def write(self, folder: Path, plugins_path: str | None) -> dict[str, Any]:
        """Writes the reference pages and removes outdated ones."""
        from sandbox.storage.atomic import storage_errors, write_atomic

        made = pages(plugin_folders([f"plugins_path={plugins_path}"] if plugins_path else []))
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.md"):
                if old.name not in made and old.read_text(encoding="utf-8").startswith(MADE):
                    old.unlink()
            for name, text in made.items():
                write_atomic(folder / name, text)
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
        yield from WRAPPER.wrap(f"{BROKEN}{plugin.error}")
        return
    yield from WRAPPER.wrap(plugin.doc)
    try:
        contract = render(
            "contract.txt", cfg=plugin.config(plugin=plugin.key), group=plugin.group, clip=clip,
            latents=_latents, schedules=_schedules,
        )  # fmt: skip
    except Exception as e:  # the plugin's own code may raise anything
        contract = f"{BROKEN}its Config raises {type(e).__name__}: {e}"
    yield from WRAPPER.wrap("; ".join(filter(None, contract.splitlines())))
    if names := ", ".join(settings(plugin.config())):
        yield from WRAPPER.wrap(f"settings: {names}")


def _latents(cfg: FirstStageConfig, clip: Clip) -> str:
    try:
        return f"become latents of {cfg.latents(clip)}"
    except ConfigError as e:
        return f"are not supported ({e})"


def _schedules(cfg: Any) -> list[str]:
    """Names of the schedules that `cfg` works with, in their default settings."""
    known = [p.name for p in registry.plugins("schedule") if p.config]
    return [name for name in known if not list(cfg.accepts(registry.default("schedule", name)))]
