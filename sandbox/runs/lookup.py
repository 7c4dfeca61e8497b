"""Finds earlier runs: the one that a task works on, and its configuration."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sandbox.config import discovery, registry
from sandbox.config.registry import SEVERAL
from sandbox.config.root import GROUPS, OF_THE_COMMAND, Root, from_container, resolve_paths
from sandbox.contracts import ConfigError, SandboxError, SizeError, StorageError
from sandbox.runs.run import Run, existing_run

# The groups that a run's weights depend on: another plugin or setting there makes them wrong.
DETERMINES_WEIGHTS = ("vae", "conditioning", "backbone", "schedule")
TRAINED_BY = "task/train"  # runs of other tasks have no system (task=train_vae: a first stage)

log = logging.getLogger(__name__)


def find_run(out: str, named: str | None) -> Path:
    """The run folder `named`, else the newest finished one in `out`. Raises ConfigError."""
    if named is not None:
        existing = sorted(str(p.parent) for p in Path(out).glob("*/config.yaml"))
        hint = f"there is {', '.join(existing[-3:]) or f'no run in out={out}'}"
        folder = existing_run(Path(named), "task.run", hint).folder
        task = task_of(folder)
        if task != TRAINED_BY:
            raise ConfigError(
                f"task.run={named}: a run of {task.replace('/', '=')}, which has no system to "
                "sample from; want a run of task=train"
            )
        return folder
    finished = [p.parent for p in Path(out).glob("*/result.json")]
    finished.sort(key=lambda f: (f / "result.json").stat().st_mtime_ns, reverse=True)
    newest = next((f for f in finished if _is_trained(f)), None)
    if newest is None:
        raise ConfigError(
            f"task.run=null: no finished run in out={out}; train one first (python run.py), "
            "or name a folder"
        )
    return newest


def _is_trained(folder: Path) -> bool:
    """Whether it is a run of task=train; False, with one line, for a damaged folder."""
    try:
        return task_of(folder) == TRAINED_BY
    except StorageError as e:
        log.warning("skipped run: %s", e)
        return False


def read_root(folder: Path) -> Root:
    """The configuration of a run folder, with file paths that are valid in the current folder.

    Raises ConfigError, PluginError, StorageError.
    """
    run = Run(folder)
    try:
        root = from_container(run.config())
    except SandboxError as e:
        raise type(e)(*(f"{folder}: {text}" for text in e.args)) from e
    start = run.started_in()
    return root if start == Path.cwd() else resolve_paths(root, start)


def check_same_system(
    folder: Path, own: Root, root: Root, groups: Sequence[str] = DETERMINES_WEIGHTS
) -> None:
    """Raises ConfigError where `root` differs from `own`, the run in `folder`, in these groups.

    Weights may fit a system with another schedule, target or number of heads, but its samples
    would be wrong.
    """
    problems = []
    for group in groups:
        if apart := _differing(group, getattr(own, group), getattr(root, group)):
            was, now = (", ".join(f"{k}={v[i]}" for k, v in apart.items()) for i in (0, 1))
            problems.append(
                f"{now}: the weights of {folder} were trained with {was}; leave this setting out, "
                "or train another run"
            )
    if problems:
        raise ConfigError(*problems)


def _differing(group: str, own: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> both values of settings that must be equal; null is filled in by wiring."""
    if other is None:  # wiring refuses that
        return {}
    if own.plugin != other.plugin:
        return {group: (own.plugin.rpartition("/")[2], other.plugin.rpartition("/")[2])}
    names = [f.name for f in fields(own) if f.name not in own.may_differ]
    pairs = {f"{group}.{name}": (getattr(own, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[1] not in (None, pair[0])}


def first_stage_problems(root: Root) -> Iterator[str]:
    """Problems with a run folder as vae.weights, from its settings alone."""
    here, run = root.vae, Run(root.vae.weights or "")
    if "weights" not in here.files() or not run.config_file.is_file():
        return
    try:
        there = registry.typed(run.config().get("vae"))
    except SandboxError:
        return  # of another version of the program: names and shapes are compared later
    if there is None or any(here.problems()) or any(root.data.problems()):
        return
    where, name = f"vae.weights={root.vae.weights}", here.plugin.rpartition("/")[2]
    if there.plugin != here.plugin:
        yield f"{where}: a run of vae={there.plugin.rpartition('/')[2]}, not of vae={name}"
        return
    clip = root.data.clips()[0]
    with suppress(SizeError):  # wiring reports it
        sizes = there.latents(clip), here.latents(clip)
        theirs, ours = ((z.channels, z.height, z.width) for z in sizes)  # frames may be windowed
        if theirs != ours:
            yield (
                f"{where}: its first stage makes latents of {sizes[0]}, vae={name} has settings "
                f"for {sizes[1]}; choose those that it was made with"
            )


def inherited_options(overrides: Sequence[str]) -> list[str]:
    """Overrides for the options of an earlier run, where the task of `overrides` works on one.

    Put in front of `overrides`, they let `task=sample sampler.eta=0` compose with the sampler of
    that run. Groups that `overrides` choose are left out; so is everything in a sweep over runs.
    """
    given = {o.partition("=")[0].lstrip("+~"): o.partition("=")[2] for o in overrides}
    plugin = discovery.chosen_plugin("task", given.get("task", "train"))
    if plugin is None or plugin.config is None or not plugin.config().uses_run():  # type: ignore[attr-defined]
        return []
    if "task.run" not in given and given.keys() & {"init_from", "experiment"}:
        return []  # the weights do not come from a run
    named, out = (
        given.get(k, d).strip("'\"") for k, d in (("task.run", "null"), ("out", Root().out))
    )
    try:
        root = read_root(find_run(out, None if named == "null" else named))
    except (ConfigError, StorageError):
        return []  # a sweep over runs, or no run, which the task reports
    found = []
    for group in GROUPS:
        if group in given or group in OF_THE_COMMAND:
            continue
        value = getattr(root, group)
        if group in SEVERAL:
            found.append(f"{group}=[{','.join(value)}]")
        elif is_dataclass(value):
            found.append(f"{group}={value.plugin.rpartition('/')[2]}")  # type: ignore[attr-defined]
    return found


def task_of(folder: Path) -> str:
    """The task of a run folder, such as "task/train"; empty where it is not recorded."""
    return (Run(folder).config().get("task") or {}).get("plugin", "")
