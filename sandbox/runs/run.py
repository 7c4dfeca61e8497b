"""The run folder: its lock and the files in it.

The name is the recipe and a hash of the resolved config, so the same command finds its run again:

    outputs/default-1a2b3c4d/   the first run of this configuration; -2, -3 ... are further ones
      lock                        names the running process; the system frees it when that dies
      config.yaml                 resolved, secrets masked
      environment.json            versions, code, machine, command line and its folder; earlier
                                  starts in "earlier"; hashes of the files below
      metrics.jsonl               metrics, a line per step; the last line of a step counts
      checkpoints/ samples/
      result.json                 written last: the run is finished

`steps` belongs to the hash: schedules depend on it, and the runs of a sweep over it need folders of
their own. To train a finished run for longer, name its folder:
`resume.run=outputs/default-1a2b3c4d steps=2400`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from sandbox.config.added_settings import with_added
from sandbox.config.secrets import mask
from sandbox.config.static_reader import first_line
from sandbox.contracts import ConfigError, StorageError
from sandbox.runs import records
from sandbox.runs.environment import environment
from sandbox.storage.atomic import storage_errors
from sandbox.storage.locks import FileLock

log = logging.getLogger(__name__)


class Run:
    """A run folder. `open_run` gives one with its lock; readers use `Run(folder)`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.resumed = False  # whether an earlier process started this run
        self.config_file = self.folder / "config.yaml"
        self.environment = self.folder / "environment.json"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.checkpoints = self.folder / "checkpoints"
        self.samples = self.folder / "samples"
        self.result = self.folder / "result.json"
        self._config: Mapping[str, Any] | None = None  # of this start, until it is accepted
        self._accepted = False
        self._own_lock = FileLock(self.folder / "lock")
        self._last_line_is_complete = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        return self.result.is_file()

    def config(self) -> dict[str, Any]:
        """The recorded config, with settings that were added later. Raises StorageError."""
        import yaml

        text = records.read(self.folder, self.config_file.name)
        try:
            found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
            if not isinstance(found, dict):
                raise ValueError("no settings")
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            reason = first_line(str(e)) or type(e).__name__
            raise StorageError(f"{self.config_file}: cannot be read ({reason})") from e
        return with_added(found)

    def read(self, name: str) -> dict[str, Any]:
        """The dict in a JSON file of the run; empty where there is none.

        Raises StorageError for a damaged one.
        """
        return records.read_dict(self.folder, name)

    def started_in(self) -> Path:
        """The folder that its relative paths refer to: that of its last start, if it exists."""
        folder = Path(self.read(self.environment.name).get("folder", ""))
        return folder if folder.is_absolute() and folder.is_dir() else Path.cwd()

    def record_all(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Appends metrics of optimizer steps, in one write; a later value of a step counts.

        Raises StorageError.
        """
        self._append("".join(json.dumps({"step": s, **m}) + "\n" for s, m in rows))

    def rewind(self, step: int) -> None:
        """Records that the run continues from `step`: metrics of later steps are void."""
        self._append(json.dumps({"rewind": step}) + "\n")

    def metrics(self) -> dict[int, dict[str, float]]:
        """Step -> metrics, in step order. Skips a line that a kill has cut off.

        Raises StorageError where the file of a finished run has changed.
        """
        found: dict[int, dict[str, float]] = {}
        if not self.metrics_file.is_file():
            return found
        records.check_hash(self.folder, self.metrics_file.name)
        with self.metrics_file.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                kinds = {k: type(v) for k, v in row.items()} if isinstance(row, dict) else {}
                if kinds.get("rewind") is int:
                    found = {s: m for s, m in found.items() if s <= row["rewind"]}
                elif kinds.get("step") is int:
                    found.setdefault(row.pop("step"), {}).update(row)
        return dict(sorted(found.items()))

    def describe(self, **facts: Any) -> None:
        """Adds facts that are known later (device, kernels) to environment.json."""
        name = self.environment.name
        records.write_dict(self.folder, name, {**self.read(name), **mask(facts)})

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json atomically, which marks the run as finished."""
        records.add_hash(self.folder, self.metrics_file.name)
        records.write_dict(self.folder, self.result.name, mask(result))

    def holder(self) -> str:
        """The process that runs in the folder, such as "process 12 on host a (since ...)"."""
        return self._own_lock.holder()

    def close(self) -> None:
        """Releases the lock; a folder whose start was not accepted is as it was."""
        self._own_lock.release(unused=not self._accepted)

    def accept(self) -> None:
        """Records this start: its config and environment. A later call does nothing.

        Called when all that the run continues from is loaded. Raises StorageError.
        """
        import yaml

        config, self._config = self._config, None
        if config is None:
            return
        earlier, now = self.read(self.environment.name), environment()
        self._accepted = True
        was, code = earlier.get("code"), now["code"]
        if self.resumed and was != code:
            log.warning("%s is resumed with other code: %s -> %s", self.folder, was, code)
        if left := self._own_lock.left:
            log.warning("%s: %s was running in it and may still be; stop it", self.folder, left)
        if earlier:
            now["earlier"] = [*earlier.pop("earlier", []), earlier]
        with storage_errors(self.folder):
            self.checkpoints.mkdir(exist_ok=True)
            self.samples.mkdir(exist_ok=True)
            if self.finished:  # with fewer steps
                self.result.replace(self.folder / "result.earlier.json")
        records.remove_hash(self.folder, self.metrics_file.name)
        text = yaml.safe_dump(mask(config), sort_keys=False, width=100)
        records.write(self.folder, self.config_file.name, text)
        records.write_dict(self.folder, self.environment.name, now)

    def _lock(self, seconds: float = 0) -> bool:
        """Takes the lock, which the system frees when this process dies.

        False if another process holds it, also after `seconds`.
        """
        path = self._own_lock.path
        try:
            return self._own_lock.take(0 if self._own_lock.is_own else seconds)
        except OSError as e:
            if e.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise StorageError(
                    f"{path}: this file system has no locks ({e.strerror}); choose another out="
                ) from e
            with storage_errors(path):
                raise

    def _append(self, text: str) -> None:
        with storage_errors(self.metrics_file), self.metrics_file.open("ab+") as file:
            if not self._last_line_is_complete and file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill has cut it off
                    text = "\n" + text
            file.write(text.encode())
        self._last_line_is_complete = True


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file; empty where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def existing_run(folder: Path, setting: str = "", hint: str = "want the folder of a run") -> Run:
    """The run in `folder`. Raises ConfigError, which names `setting` and ends with `hint`."""
    run, where = Run(folder), f"{setting}={folder}" if setting else folder
    if not run.config_file.is_file():
        raise ConfigError(f"{where}: no run there (it has no config.yaml); {hint}")
    return run
