"""task=plugins: what is there, from which file, and what each component promises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sandbox import registry
from sandbox.contracts import Clip, ConfigError, TaskConfig
from sandbox.registry import register


@register("task", "plugins")
class Plugins:
    """Lists every plugin with its file and its contract."""

    @dataclass
    class Config(TaskConfig):
        needs_torch: ClassVar[bool] = False
        only: str | None = None  # one group

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        if self.cfg.only is not None and self.cfg.only not in registry.groups():
            raise ConfigError(f"task.only={self.cfg.only!r}: no such group{registry.nearest(self.cfg.only, registry.groups())}")
        clip = root.data.clips()[0] if root.data is not None else Clip(3, 9, 16, 16)
        for group in registry.groups():
            if self.cfg.only in (None, group):
                print(f"\n{group}")
                for p in registry.plugins(group):
                    print(f"  {p.name:<16} {_short(p.path)}")
                    print(f"  {'':<16} {p.error or _contract(p.config(plugin=p.key), clip)}")  # type: ignore[misc]
        return {"plugins": len(registry.plugins())}


def _short(path: Path | None) -> str:
    if path is None:
        return "live code"
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


QUESTIONS = ("fitted", "encodes", "needs", "takes", "provides", "signals", "predicts", "ends_in_noise", "outputs", "metric")


def _contract(cfg: Any, clip: Clip) -> str:
    """What a Config with its defaults answers, on one line."""
    said = []
    if hasattr(cfg, "latents"):
        try:
            said.append(f"{clip} -> {cfg.latents(clip)}")
        except ConfigError as e:
            said.append(f"{clip} does not fit: {e}")
    if hasattr(cfg, "clips"):
        said.append("clips " + ", ".join(map(str, cfg.clips())))
    for name in QUESTIONS:
        if hasattr(cfg, name):
            value = getattr(cfg, name)()
            text = ", ".join(sorted(value)) if isinstance(value, frozenset | tuple) else str(value)
            said.append(f"{name} {text or 'nothing'}")
    return "; ".join(said) or "settings only"
