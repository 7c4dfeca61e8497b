"""Runs that are there already: which one a task works on, and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sandbox import config, registry
from sandbox.config import GROUPS, OF_THE_COMMAND, Root, from_container, placed
from sandbox.contracts import ConfigError, SandboxError, SizeError, StorageError
from sandbox.registry import SEVERAL
from sandbox.runs import Run

# What a run's weights are made for: with another one they do not fit, or mean something else.
MADE_FOR = ("vae", "conditioning", "backbone", "schedule")
TRAINED_BY = "task/train"  # runs of other tasks hold no system: task=train_vae leaves a first stage


def find_run(out: str, named: str | None) -> Path:
    """The run folder `named`, else the newest finished one below `out`.

    Raises ConfigError with what there is.
    """
    if named is not None:
        folder = Path(named)
        if not Run(folder).config_file.is_file():
            raise ConfigError(
                f"task.run={named}: no run there (it has no config.yaml); there is "
                + _some(Path(out))
            )
        task = task_of(folder)
        if task != TRAINED_BY:
            raise ConfigError(
                f"task.run={named}: a run of {task.replace('/', '=')}, which leaves no system to "
                "sample from; want a run of task=train"
            )
        return folder
    finished = [p.parent for p in Path(out).glob("*/result.json")]
    finished.sort(key=lambda f: (f / "result.json").stat().st_mtime_ns, reverse=True)
    newest = next((f for f in finished if task_of(f) == TRAINED_BY), None)
    if newest is None:
        raise ConfigError(
            f"task.run=null: no finished run in out={out}; train one first (python run.py), "
            "or name a folder"
        )
    return newest


def read_root(folder: Path) -> Root:
    """The configuration of a run folder, whose files are found from any folder.

    Raises ConfigError, PluginError, StorageError.
    """
    run = Run(folder)
    try:
        root = from_container(run.config())
    except SandboxError as e:
        raise type(e)(*(f"{folder}: {text}" for text in e.args)) from e
    start = run.started_in()
    return root if start == Path.cwd() else placed(root, start)


def check_same_system(folder: Path, own: Root, root: Root) -> None:
    """Raises ConfigError where `root` is of another system than the run in `folder`, `own`.

    A network that was trained with another schedule, target or number of heads fits, and its
    samples are wrong.
    """
    problems = []
    for group in MADE_FOR:
        apart = _apart(group, getattr(own, group), getattr(root, group))
        if apart:
            was, now = (", ".join(f"{k}={v[i]}" for k, v in apart.items()) for i in (0, 1))
            problems.append(
                f"{now}: the weights of {folder} are made for {was}; leave it out, or train "
                "another run"
            )
    if problems:
        raise ConfigError(*problems)


def _apart(group: str, own: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> both values of what must be equal and is not; null is what wiring will fill in."""
    if other is None:  # emptied, which wiring refuses
        return {}
    if own.plugin != other.plugin:
        return {group: (own.plugin.rpartition("/")[2], other.plugin.rpartition("/")[2])}
    names = [f.name for f in fields(own) if f.name not in own.may_differ]
    pairs = {f"{group}.{name}": (getattr(own, name), getattr(other, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[1] not in (None, pair[0])}


def other_first_stage(root: Root) -> Iterator[str]:
    """Problems with a run folder as vae.weights, as far as its settings tell."""
    here, run = root.vae, Run(root.vae.weights or "")
    if "weights" not in here.files() or not run.config_file.is_file():
        return
    try:
        made = registry.typed(run.config().get("vae"))
    except SandboxError:
        return  # of another version of the program: its names and shapes are compared
    if made is None or any(here.problems()) or any(root.data.problems()):
        return
    where, name = f"vae.weights={root.vae.weights}", here.plugin.rpartition("/")[2]
    if made.plugin != here.plugin:
        yield f"{where}: a run of vae={made.plugin.rpartition('/')[2]}, not of vae={name}"
        return
    clip = root.data.clips()[0]
    with suppress(SizeError):  # said by the wiring
        sizes = made.latents(clip), here.latents(clip)
        theirs, ours = ((z.channels, z.height, z.width) for z in sizes)  # frames: of windows, too
        if theirs != ours:
            yield (
                f"{where}: its first stage makes latents of {sizes[0]}, vae={name} has settings "
                f"for {sizes[1]}; choose those that it was made with"
            )


def choices(overrides: Sequence[str]) -> list[str]:
    """Overrides that choose what an earlier run has, where the task of `overrides` works on one.

    With them in front, `task=sample sampler.eta=0` is composed with the sampler of that run.
    Groups that `overrides` choose themselves, and runs that are swept over, are left alone.
    """
    said = {o.partition("=")[0].lstrip("+~"): o.partition("=")[2] for o in overrides}
    plugin = config.chosen_plugin("task", said.get("task", "train"))
    if plugin is None or plugin.config is None or not plugin.config().uses_run():  # type: ignore[attr-defined]
        return []
    if "task.run" not in said and said.keys() & {"init_from", "experiment"}:
        return []  # weights stand for a run
    named, out = (
        said.get(k, d).strip("'\"") for k, d in (("task.run", "null"), ("out", Root().out))
    )
    try:
        root = read_root(find_run(out, None if named == "null" else named))
    except (ConfigError, StorageError):
        return []  # a sweep over runs, or no run: said when the task asks for it
    found = []
    for group in GROUPS:
        if group in said or group in OF_THE_COMMAND:
            continue
        value = getattr(root, group)
        if group in SEVERAL:
            found.append(f"{group}=[{','.join(value)}]")
        elif is_dataclass(value):
            found.append(f"{group}={value.plugin.rpartition('/')[2]}")  # type: ignore[attr-defined]
    return found


def task_of(folder: Path) -> str:
    """The task that made a run folder, such as "task/train"; empty where it does not say."""
    return (Run(folder).config().get("task") or {}).get("plugin", "")


def _some(out: Path) -> str:
    found = sorted(str(p.parent) for p in out.glob("*/config.yaml"))
    return ", ".join(found[-3:]) or f"no run in out={out}"
