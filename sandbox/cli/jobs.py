"""One job: its configuration resolved, checked, and handed to its task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox.config import discovery, registry
from sandbox.config.root import Root, overridden, to_root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import ConfigError, PluginConfig


def run(cfg: Any, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """One job: typed, wired, and handed to its task; returns what the task returns."""
    return perform(settled(to_root(cfg), overrides), overrides, group)


def settled(root: Root, overrides: Sequence[str]) -> Root:
    """`root`; where its task works on an earlier run, that run's configuration with `overrides`.

    Raises ConfigError where a run is named and weights that it would not use.
    """
    if root.task is None or not root.task.uses_run():
        return root
    if root.task.run is None and root.init_from is not None and root.task.accepts_init_from():
        return root
    from sandbox.runs.lookup import check_same_system, find_run, read_root

    folder = find_run(root.out, root.task.run)
    own = read_root(folder)
    if root.init_from is not None and own.adapter is None:
        raise ConfigError(
            f"init_from={root.init_from} and task.run={root.task.run}: a run has weights of its "
            "own; give one of them"
        )
    root = overridden(own, root, overrides)
    check_same_system(folder, own, root)
    return replace(root, task=replace(root.task, run=str(folder)))


def perform(root: Root, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """Hands a configuration to its task, wired where the task works on a system."""
    wiring = checked(root)
    # Read by OpenMP when torch is imported. Threads that spin while they wait take 3 to 15 times
    # as long on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    task = registry.create(root.task)
    return task(root) if wiring is None else task(wiring, list(overrides), group)


def checked(root: Root) -> Wiring | None:
    """`root`, wired where its task works on a system; the files that it names are there.

    Raises ConfigError with every problem.
    """
    if root.task is None:
        raise ConfigError(f"task=null: want one of {', '.join(discovery.options('task'))}")
    if not root.task.needs_torch:
        parts = [x for x in root.parts() if x[0].partition(".")[0] in root.task.checks]
        problems = [f"{path}.{p}" for path, cfg in parts for p in cfg.problems()]
        problems += [p for path, cfg in parts for p in _absent(path, cfg)]
        if problems:
            raise ConfigError(*problems)
        return None
    named, reads_data = {}, root.task.reads_data()
    groups = ["task"]
    if reads_data or root.task.uses_run():
        named["init_from"] = root.init_from
        groups += ["conditioning", "adapter"]
    if reads_data or (root.task.accepts_init_from() and root.task.run is None):
        named["vae.weights"] = getattr(root.vae, "weights", None)
    if reads_data:
        groups += ["data", "reconstruction", "metric"]
    absent = [
        f"{name}={file}: no such file or folder"
        for name, file in named.items()
        if file not in (None, "auto", "None") and not Path(file).exists()
    ]
    for group in groups:
        absent += _absent(group, getattr(root, group))
    if "vae.weights" in named and None not in (root.vae, root.data):
        from sandbox.runs.lookup import first_stage_problems

        absent += first_stage_problems(root)
    try:
        wiring = wire(root)
    except ConfigError as e:
        raise ConfigError(*e.problems, *absent) from e
    if absent:
        raise ConfigError(*absent)
    return wiring


def _absent(group: str, cfg: PluginConfig | None) -> list[str]:
    """Files and folders of a component that are not there, a line each."""
    return [
        f"{group}.{name}=null: name the file or folder of the {group}"
        if file is None
        else f"{group}.{name}={file}: no such file or folder"
        for name, file in (cfg.files() if cfg is not None else {}).items()
        if file is None or not Path(file).expanduser().exists()
    ]


def check(cfg: Any, overrides: Sequence[str]) -> None:
    """Raises every configuration error of a job, as starting it would."""
    checked(settled(to_root(cfg), overrides))
