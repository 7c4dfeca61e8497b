"""The run folder: its name, its lock, resuming, and the files in it.

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
import fnmatch
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sandbox.config.added_settings import with_added, without_added
from sandbox.config.root import to_container
from sandbox.config.secrets import folder_name, mask
from sandbox.config.static_reader import first_line
from sandbox.contracts import ConfigError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.runs import records
from sandbox.runs.environment import environment
from sandbox.storage.atomic import storage_errors
from sandbox.storage.locks import FileLock

# Settings that do not change a result, and all below them. They are not part of a run's identity
# and may differ when it is resumed.
IGNORED = (
    "out",
    "cache",
    "resume",
    "logger",
    "checkpoint",
    "plugins_path",
    "*.num_workers",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.log_every",
    "trainer.low_vram",
    "trainer.timeout",
    "hydra",
)
LOCK_SECONDS = 2.0  # wait for the ranks of a command that was just killed
# Groups and settings that determine the operations of an optimizer step.
WORK = ("data", "vae", "backbone", "conditioning", "adapter", "trainable", "precision", "trainer")

log = logging.getLogger(__name__)


# --- identity -------------------------------------------------------------------------------------


def identity(config: Mapping[str, Any]) -> str:
    """Eight hex digits, a hash of every setting that may change the result."""
    return _hash(flat_settings(mask(without_added(config))))


def identity_of_work(config: Mapping[str, Any]) -> str:
    """Eight hex digits, a hash of every setting that changes the operations of a step."""
    settings = flat_settings(without_added(config))
    return _hash({k: v for k, v in settings.items() if k.partition(".")[0] in WORK})


def _hash(settings: Mapping[str, str]) -> str:
    counted = sorted((k, v) for k, v in settings.items() if not matches(k, IGNORED))
    return hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:8]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line per setting that differs: "lr: 0.1 -> 0.2"; secrets are not compared."""
    return [f"{name}: {a} -> {b}" for name, (a, b) in changes(old, new).items()]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> both values of settings that differ."""
    a, b = flat_settings(mask(old)), flat_settings(mask(new))
    pairs = {k: (a.get(k, "(absent)"), b.get(k, "(absent)")) for k in {**a, **b}}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def flat_settings(node: Any, name: str = "") -> dict[str, str]:
    """Dotted name -> value as JSON text, so that also NaN equals itself."""
    if isinstance(node, Mapping) and node:
        found: dict[str, str] = {}
        for key, value in node.items():
            found |= flat_settings(value, f"{name}.{key}" if name else str(key))
        return found
    return {name: json.dumps(node, default=str)} if name else {}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a setting, or one that it is part of, matches a pattern."""
    return any(
        fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns
    )


# --- opening --------------------------------------------------------------------------------------


def open_run(
    out: str | Path,
    name: str,
    config: Mapping[str, Any],
    resume: str = "auto",
    allow: Sequence[str] = (),
) -> Run:
    """The folder in which this configuration runs, locked.

    resume: "auto" continues the newest folder of this identity that is neither finished nor in use,
    else creates the next one; "never" always creates one; a folder name continues that run, even if
    it is finished, with an equal or larger `steps`. `allow`: settings that may then differ although
    they may change the result. No file of a resumed run changes before `Run.accept`. Raises
    StorageError where nothing can be written, ConfigError for a folder that cannot be continued.
    """
    if resume not in ("auto", "never"):
        run = _reopen(Path(resume), config, allow)
    else:
        run = _resume_or_create(Path(out), _stem(name, config), config, resume == "auto")
    run.resumed, run._config = run.config_file.is_file(), config
    try:
        if not run.resumed:
            run.accept()
    except BaseException:
        run.close()
        raise
    return run


def _stem(name: str, config: Mapping[str, Any]) -> str:
    return f"{folder_name(name)}-{identity(config)}"


def finished_run(root: Any) -> Path | None:
    """The newest finished run folder of a typed, wired Root; None where there is none."""
    return next((path for path in _folders_of(root) if Run(path).finished), None)


def open_root(root: Any) -> Run:
    """`open_run` for a typed Root (`sandbox.config.composition`), named for its recipe."""
    which = root.resume.run or root.resume.mode
    return open_run(root.out, root.recipe, to_container(root), which, root.resume.allow)


def resumes(root: Any) -> bool:
    """Whether `open_root` resumes a run, which has its own weights."""
    if root.resume.run is not None:
        return True
    return root.resume.mode == "auto" and any(not Run(p).finished for p in _folders_of(root))


@contextmanager
def open_on_rank0(root: Any, rank: Rank) -> Iterator[Run]:
    """`open_root` in rank 0, the only one that writes; other ranks get the folder to read from."""
    own: Run | None = None
    with rank.rank0_first():
        if rank.index == 0:
            own = open_root(root)
    folder = rank.broadcast_plain(str(own.folder) if own else None)
    with own or Run(folder) as run:
        yield run


def _resume_or_create(out: Path, stem: str, config: Mapping[str, Any], resume: bool) -> Run:
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for n, folder in enumerate(_folders(out, stem, config) if resume else ()):
        run = Run(folder)
        if run.finished:
            continue
        if run.config_file.is_file():
            run.config()  # raises where it is damaged: it may record other settings
        if not run._lock(0 if n else LOCK_SECONDS):
            log.warning("%s: %s is running in it; this is a further run", folder, run.holder())
        elif not run.finished:  # it may have finished before the lock was taken
            return run
        else:
            run.close()
    for n in itertools.count(1):
        run = Run(out / (stem if n == 1 else f"{stem}-{n}"))
        with storage_errors(run.folder):
            try:
                run.folder.mkdir()
            except FileExistsError:
                continue
        if run._lock():  # else another process has taken the empty folder
            return run
    raise AssertionError("count is endless")


def _folders_of(root: Any) -> list[Path]:
    config = to_container(root)
    return _folders(Path(root.out), _stem(root.recipe, config), config)


def _folders(out: Path, stem: str, config: Mapping[str, Any]) -> list[Path]:
    """Folders of this identity whose recorded settings count as these, newest first."""
    found = []
    for path in out.glob(f"{stem}*"):
        match = re.fullmatch(r"(?:-([1-9]\d*))?", path.name[len(stem) :])
        if match and path.is_dir() and not _had_other_added_settings(Run(path), config):
            found.append((int(match[1] or 1), path))
    return [path for _, path in sorted(found, reverse=True)]


def _had_other_added_settings(run: Run, config: Mapping[str, Any]) -> bool:
    """Whether an older version made this run with another value of a setting added since."""
    if not run.config_file.is_file():
        return False
    try:
        recorded = run.config()
    except StorageError:  # damaged; resuming raises it
        return False
    return any(not matches(name, IGNORED) for name in changes(recorded, config))


def existing_run(folder: Path, setting: str = "", hint: str = "want the folder of a run") -> Run:
    """The run in `folder`. Raises ConfigError, which names `setting` and ends with `hint`."""
    run, where = Run(folder), f"{setting}={folder}" if setting else folder
    if not run.config_file.is_file():
        raise ConfigError(f"{where}: no run there (it has no config.yaml); {hint}")
    return run


def _reopen(folder: Path, config: Mapping[str, Any], allow: Sequence[str]) -> Run:
    run = existing_run(folder, "resume.run")
    if not run._lock():
        raise ConfigError(
            f"resume.run={folder}: {run.holder()} is running in it; wait for it or stop it"
        )
    try:
        _check_changes(run, config, allow)
    except BaseException:
        run.close()
        raise
    return run


def _check_changes(run: Run, config: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Raises ConfigError for a setting that may change the result and that is not in `allow`."""
    folder, recorded, start = run.folder, run.config(), run.started_in()
    for line in differences(recorded, config):
        log.info("resume: %s", line)
    refused = [
        f"{k}: was {a} in {folder}, is {b} now, which may change the result; "
        f"to allow it: resume.allow=[{k}]"
        for k, (a, b) in changes(recorded, config).items()
        if not matches(k, (*IGNORED, *allow))
        and not (k == "steps" and a.isdecimal() and b.isdecimal() and int(b) >= int(a))
        and not _is_same_file(start, a, b)
    ]
    if refused:
        raise ConfigError(*refused)


def _is_same_file(start: Path, a: str, b: str) -> bool:
    """Whether two values (JSON) name one file or folder; `a` is relative to `start`."""
    if not a[:1] == b[:1] == '"' or "/" not in a + b:
        return False
    one, other = start / json.loads(a), Path(json.loads(b))
    return one.exists() and one.resolve() == other.resolve()


# --- the folder -----------------------------------------------------------------------------------


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
        records.check(self.folder, self.metrics_file.name)
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
        records.add(self.folder, self.metrics_file.name)
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
        records.forget(self.folder, self.metrics_file.name)
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
