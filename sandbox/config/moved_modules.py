"""Keeps the import paths of version 0.1 working: there, all modules were at the top of `sandbox/`.

`OLD_MODULES` maps each old module to its new ones below `sandbox`. Imports of the old paths warn
with the new path (DeprecationWarning).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

OLD_MODULES: dict[str, tuple[str, ...]] = {
    "contracts.footage": ("contracts.video",),
    "ablation": ("reports.ablation",),
    "ablation_page": ("reports.ablation_page",),
    "ablation_runs": ("reports.ablation_runs",),
    "agent": ("cli.wandb_agent",),
    "autoencoding": ("model.autoencoding",),
    "charts": ("reports.charts",),
    "checkpoint": ("storage.checkpoint",),
    "comparable": ("runs.protocol",),
    "config": (
        "config.root",
        "config.composition",
        "config.discovery",
        "config.hydra_compose",
        "config.paths",
    ),
    "data": ("data.loader", "data.order", "data.batching"),
    "devices": ("model.devices",),
    "earlier": ("runs.lookup",),
    "ema": ("model.ema",),
    "encoding": ("pipelines.encode",),
    "environment": ("runs.environment",),
    "evaluation": ("evaluation.evaluate",),
    "exporting": ("weights.export",),
    "far_errors": ("distributed.remote_errors",),
    "figures": ("reports.ablation_page",),
    "files": ("storage.atomic",),
    "first_stages": ("storage.first_stage_files", "training.first_stage"),
    "fitting": ("training.loop",),
    "footage": ("data.video_files",),
    "initialise": ("weights.init_from",),
    "latent_diffusion": ("model.latent_diffusion",),
    "launch": ("distributed.supervisor", "distributed.rank_handle"),
    "lodging": ("model.offload",),
    "looks": ("training.image_rows",),
    "main": ("cli.main", "cli.jobs", "cli.command_line", "cli.errors"),
    "markup": ("reports.markup",),
    "media": ("reports.media",),
    "mistakes": ("config.setting_errors",),
    "module": ("model.trainable",),
    "multirun": ("cli.multirun",),
    "outcome": ("training.finish",),
    "parts": ("model.components",),
    "prepared": ("pipelines.prepare_outputs",),
    "preparing": ("pipelines.prepare",),
    "progress": ("reports.progress",),
    "prompt_checks": ("evaluation.prompt_checks",),
    "prompts": ("evaluation.prompts",),
    "published": ("storage.published",),
    "randomness": ("data.randomness",),
    "rank": ("distributed.rank", "distributed.rank_process", "distributed.signals"),
    "reading": ("config.static_reader",),
    "reference": ("cli.reference",),
    "report": ("reports.run_page",),
    "runs": ("runs.run", "runs.resume", "runs.identity"),
    "safety": ("config.safety",),
    "sampling": ("model.sampling",),
    "scores": ("reports.scores",),
    "secrets": ("config.secrets",),
    "selection": ("config.param_groups",),
    "sharding": ("model.sharding",),
    "shards": ("storage.shards",),
    "statistics": ("reports.statistics",),
    "stored": ("model.cached_latents",),
    "systems": ("training.build",),
    "tracking": ("training.tracking",),
    "training": ("training.setup", "training.state", "training.loop"),
    "twins": ("runs.diff",),
    "ui": ("ui.page",),
    "usage": ("cli.help",),
    "warm": ("distributed.preload",),
    "weight_files": ("storage.weight_files",),
    "whole_systems": ("weights.system_files",),
    "wiring": ("config.wiring",),
    "wishes": ("ui.requests",),
    "workers": ("distributed.pool",),
}

PACKAGES = ("config", "data", "runs", "training")  # old modules that are packages now
RENAMED = {  # old name -> new name, in any module
    "whole": "full_tensors",
    "settled": "resolve_run",
    "checked": "check_and_wire",
}


def forward(old: str) -> Callable[[str], Any]:
    """A module `__getattr__` that resolves names of the old module `sandbox.<old>`."""

    def __getattr__(name: str) -> Any:
        full = f"sandbox.{old}.{name}"
        is_module = full in sys.modules or (old in PACKAGES and find_spec(full))
        if not name.startswith("__") and not is_module:  # the import system loads modules
            for new in OLD_MODULES[old]:
                module = importlib.import_module(f"sandbox.{new}")
                found = name if hasattr(module, name) else RENAMED.get(name, name)
                if hasattr(module, found):
                    warnings.warn(
                        f"sandbox.{old}.{name} is now sandbox.{new}.{found}",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return getattr(module, found)
        raise AttributeError(f"module 'sandbox.{old}' has no attribute {name!r}")

    return __getattr__


class OldPaths(MetaPathFinder):
    """Makes `import sandbox.<old>` return a module that forwards to the new ones."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        old = fullname.removeprefix("sandbox.")
        if old == fullname or old not in OLD_MODULES:
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = forward(spec.name.removeprefix("sandbox."))  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: names are resolved on access."""


def install() -> None:
    """Appends the finder once, after all others: existing modules take precedence."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
