"""Runs that are there already: which one a task works on, and its configuration."""

from __future__ import annotations

from pathlib import Path

from sandbox.config import Root, from_container
from sandbox.contracts import ConfigError
from sandbox.runs import Run


def find_run(out: str, named: str | None) -> Path:
    """The run folder `named`, else the newest finished one below `out`. Raises ConfigError with what there is."""
    if named is not None:
        folder = Path(named)
        if not Run(folder).config_file.is_file():
            raise ConfigError(f"task.run={named}: no run there (it has no config.yaml); there is {_some(Path(out))}")
        return folder
    finished = [p.parent for p in Path(out).glob("*/result.json") if (p.parent / "checkpoints").is_dir()]
    if not finished:
        raise ConfigError(f"task.run=null: no finished run in out={out}; train one first (python run.py), or name a folder")
    return max(finished, key=lambda f: (f / "result.json").stat().st_mtime_ns)


def read_root(folder: Path) -> Root:
    """The configuration of a run folder. Raises ConfigError, StorageError."""
    return from_container(Run(folder).config())


def _some(out: Path) -> str:
    found = sorted(str(p.parent) for p in out.glob("*/config.yaml"))
    return ", ".join(found[-3:]) or f"no run in out={out}"
