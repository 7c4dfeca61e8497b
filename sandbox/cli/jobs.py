"""One job: resolves and checks its configuration, and runs its task."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox.config import discovery, registry
from sandbox.config.plugin_faults import naming_plugins
from sandbox.config.root import Root, override_run, to_root
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import ConfigError


def check(cfg: Any, overrides: Sequence[str]) -> None:
    """Raises ConfigError with every problem of a job, without starting it."""
    check_and_wire(resolve_run(to_root(cfg), overrides))


def resolve_run(root: Root, overrides: Sequence[str]) -> Root:
    """For a task on an earlier run, that run's configuration with `overrides`; otherwise `root`.

    Raises ConfigError if the command names both a run and unrelated weights.
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
    root = override_run(own, root, overrides)
    check_same_system(folder, own, root)
    return replace(root, task=replace(root.task, run=str(folder)))


@naming_plugins()
def perform(root: Root, overrides: Sequence[str] = (), group: str | None = None) -> Any:
    """Checks a configuration and runs its task; returns the task's result."""
    wiring = check_and_wire(root)
    # OpenMP reads it when torch is imported. Spinning threads are 3 to 15 times slower on busy
    # cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    task = registry.create(root.task)
    return task(root) if wiring is None else task(wiring, list(overrides), group)


@naming_plugins()
def check_and_wire(root: Root) -> Wiring | None:
    """The wiring of `root`; None for a task that needs no system.

    Raises ConfigError with every problem, missing files included.
    """
    if root.task is None:
        raise ConfigError(f"task=null: want one of {', '.join(discovery.options('task'))}")
    if not root.task.needs_torch:
        parts = [x for x in root.parts() if x[0].partition(".")[0] in root.task.checks]
        problems = [f"{path}.{p}" for path, cfg in parts for p in cfg.problems()]
        problems += [p for path, cfg in parts for p in _missing_files(path, cfg.files())]
        if problems:
            raise ConfigError(*problems)
        return None
    missing = list(_missing_inputs(root))
    try:
        wiring = wire(root)
    except ConfigError as e:
        raise ConfigError(*e.problems, *missing) from e
    if missing:
        raise ConfigError(*missing)
    return wiring


def _missing_inputs(root: Root) -> Iterator[str]:
    """One line per file that the task of `root` reads and that does not exist."""
    named, groups, reads_data = {}, ["task"], root.task.reads_data()
    if reads_data or root.task.uses_run():
        named["init_from"] = root.init_from
        groups += ["conditioning", "adapter", "guidance"]
    if reads_first_stage := reads_data or (root.task.accepts_init_from() and root.task.run is None):
        named["vae.weights"] = getattr(root.vae, "weights", None)
    if reads_data:
        groups += ["data", "reconstruction", "metric", "method", "features"]
    for name, file in named.items():
        if file not in (None, "auto", "None") and not Path(file).exists():
            yield f"{name}={file}: no such file or folder"
    for group in groups:
        if (cfg := getattr(root, group)) is not None:
            yield from _missing_files(group, cfg.files())
    if reads_first_stage and None not in (root.vae, root.data):
        from sandbox.runs.lookup import first_stage_problems

        yield from first_stage_problems(root)


def _missing_files(path: str, files: dict[str, str | None]) -> Iterator[str]:
    for name, file in files.items():
        if file is None:
            yield f"{path}.{name}=null: name the file or folder of the {path}"
        elif not Path(file).expanduser().exists():
            yield f"{path}.{name}={file}: no such file or folder"
