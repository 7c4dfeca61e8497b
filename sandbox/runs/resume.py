"""Which folder a command runs in: a new one, or one of an earlier run that it resumes."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sandbox.config.root import to_container
from sandbox.config.secrets import folder_name
from sandbox.contracts import ConfigError, StorageError
from sandbox.distributed.rank import Rank
from sandbox.runs.identity import IGNORED, changes, differences, identity, matches
from sandbox.runs.run import Run, existing_run
from sandbox.storage.atomic import storage_errors

LOCK_SECONDS = 2.0  # wait for the ranks of a command that was just killed

log = logging.getLogger(__name__)


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
