"""Checkpoints that are either whole or not there.

A checkpoint is a file `step_00001200.ckpt` and its manifest `step_00001200.json`. The file is
written under another name, hashed on the way, synced and renamed; the manifest (SHA-256, size,
step, format) comes last. So a kill at any moment leaves the older checkpoints as they were. No file
is ever written over: the same step saved again is `step_00001200-2`. Reading checks size and hash
and loads tensors and plain containers only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from sandbox.contracts import ConfigError, StorageError
from sandbox.storage.atomic import storing, sync_folder, write_atomic
from sandbox.storage.weight_files import check_savable, load_plain, opened

FORMAT = 1  # of file and manifest; a program reads its own format and older ones
NAME = re.compile(r"step_(\d+)(?:-(\d+))?")
CHUNK = 1 << 22
LARGE = 1 << 18  # bytes that are worth a hand-over to another thread

log = logging.getLogger(__name__)

T = TypeVar("T")


# --- writing --------------------------------------------------------------------------------------


def save(
    folder: Path,
    state: Mapping[str, Any],
    step: int,
    *,
    notes: Mapping[str, Any] | None = None,
    attempts: int = 3,
    wait: float = 2.0,
) -> Path:
    """Writes `state` (plain containers and tensors) as the checkpoint of optimizer step `step`.

    `notes` go into the manifest (JSON). A write that fails is tried `attempts` times, `wait`
    seconds apart. Raises Diverged where a tensor is not finite, TypeError for what could not be
    loaded again, StorageError when it cannot be written; earlier checkpoints stay as they are.
    """
    check_savable(dict(state))
    for left in reversed(range(attempts)):
        try:
            return _write(folder, dict(state), step, dict(notes or {}))
        except OSError as e:
            if not left:
                raise StorageError(
                    f"{folder}: the checkpoint of step {step} cannot be written "
                    f"({e.strerror or e}, {attempts} attempts); earlier ones are untouched; "
                    "free some space and run the same command again"
                ) from e
            log.warning(
                "checkpoint of step %d: %s; trying again in %g s", step, e.strerror or e, wait
            )
            time.sleep(wait)
    raise ValueError(f"attempts={attempts}: want >= 1")


def save_and_prune(
    folder: Path,
    state: Mapping[str, Any],
    step: int,
    policy: Any,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """`save`, then `prune`, as the Config of a `checkpoint` plugin says."""
    path = save(folder, state, step, notes=notes, attempts=policy.attempts, wait=policy.wait)
    prune(folder, policy.keep, policy.milestones, policy.best, policy.best_of)
    return path


def _write(folder: Path, state: dict[str, Any], step: int, notes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(
        ".*.part"
    ):  # of a writer that was killed; a run folder has one writer
        left_over.unlink(missing_ok=True)
    path = _free(folder, step)
    part = folder / f".{path.name}.part"
    try:
        with part.open("wb") as file, ThreadPoolExecutor(1) as pool:
            hashed = _Hashed(file, pool)
            _serialise(state, hashed)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
        sync_folder(folder)
        manifest = {
            "format": FORMAT,
            "step": step,
            "file": path.name,
            "size": hashed.size,
            "sha256": hashed.sha256.hexdigest(),
            "notes": notes,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
    except BaseException:  # also a KeyboardInterrupt: what is not whole goes
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return path


class _Hashed:
    """A file that hashes what passes through it, so that no second copy is made or read.

    Large pieces are hashed on another thread while they are written.
    """

    def __init__(self, file: BinaryIO, pool: Executor) -> None:
        self.file, self.pool, self.sha256, self.size = file, pool, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        hashing = self.pool.submit(self.sha256.update, data) if size >= LARGE else None
        try:
            self.file.write(data)
        except OSError as e:
            self.error = e
            raise
        finally:
            if hashing is not None:
                hashing.result()
        if hashing is None:
            self.sha256.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        self.file.flush()


def _serialise(state: dict[str, Any], file: _Hashed) -> None:
    try:
        torch.save(state, file)  # pyright: ignore[reportArgumentType]
    except RuntimeError as e:  # torch's writer hides the error of the file behind its own
        raise file.error or e from None


def _free(folder: Path, step: int) -> Path:
    taken = {p.stem for p in folder.glob(f"step_{step:08d}*")}
    stem, n = f"step_{step:08d}", 1
    while stem in taken:
        n += 1
        stem = f"step_{step:08d}-{n}"
    return folder / f"{stem}.ckpt"


# --- reading --------------------------------------------------------------------------------------


class NewerFormat(StorageError):
    """From a later version of this program; never passed over, as that would lose work."""


def manifest(path: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says. Raises StorageError."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if isinstance(found["format"], int) and found["format"] > FORMAT:
            raise NewerFormat(
                f"{path}: format {found['format']}, but this program knows up to {FORMAT}; "
                "use the version that wrote it, or resume=never"
            )
        return {k: found[k] for k in ("format", "step", "file", "size", "sha256", "notes")}
    except FileNotFoundError:
        raise StorageError(
            f"{path}: no manifest beside it: no checkpoint, or not written to its end"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StorageError(
            f"{path.with_suffix('.json')}: not the manifest of a checkpoint ({e!r})"
        ) from e


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once size and SHA-256 of the file are found right. Raises StorageError."""
    said = manifest(path)
    with opened(path) as file:
        _compare(path, file, said)
    return said


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The state that was saved. Raises StorageError where file and manifest do not agree."""
    said = manifest(path)
    with opened(path) as file:
        _compare(path, file, said)
        return load_plain(path, file, device)


def skim(path: Path) -> dict[str, Any]:
    """The state with numbers that are mapped, not read: for names and shapes. Raises StorageError.

    The hash is not looked at.
    """
    manifest(path)
    with opened(path) as file:
        return load_plain(path, file, "cpu", mapped=True)


def newest(folder: Path) -> Path | None:
    """The last good checkpoint; broken ones are named in the log. Raises NewerFormat."""
    return next((path for path, _ in _good_ones(folder, verify)), None)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the last good checkpoint, also where a run prunes them meanwhile.

    Broken ones are named in the log. Raises NewerFormat.
    """
    return next((state for _, state in _good_ones(folder, load)), None)


def _good_ones(folder: Path, read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Checkpoints that can be read, newest first of those that are there by then."""
    seen: set[Path] = set()
    while left := [path for path in checkpoints(folder) if path not in seen]:
        seen.add(left[0])
        try:
            yield left[0], read(left[0])
        except NewerFormat:
            raise
        except StorageError as e:
            log.warning("passed over: %s", e)


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step. Raises ConfigError with the steps that there are."""
    for path in checkpoints(folder):
        if _step(path) == step:
            return path
    steps = ", ".join(map(str, steps_in(folder))) or "none"
    raise ConfigError(f"task.step={step}: {folder} has no such checkpoint; there is {steps}")


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints of a folder, newest first."""
    return list(dict.fromkeys(_step(path) for path in checkpoints(folder)))


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, newest first, good or broken."""
    found = {}
    for path in folder.glob("step_*"):
        match = NAME.fullmatch(path.stem)
        if match and path.suffix in (".ckpt", ".json"):
            found[int(match[1]), int(match[2] or 1)] = path.with_suffix(".ckpt")
    return [path for _, path in sorted(found.items(), reverse=True)]


def prune(folder: Path, keep: int, milestones: int = 0, best: int = 0, best_of: str = "") -> None:
    """Deletes all but the `keep` newest checkpoints, those of each `milestones`-th step (or 0), and
    the `best` whose notes have the lowest `best_of`.

    Nothing older is deleted before one of the kept is read and found good, so the last good one
    stays.
    """
    kept: list[Path] = []
    chosen = _lowest(folder, best, best_of)
    for path in checkpoints(folder):
        if len(kept) >= max(keep, 1):
            is_milestone = milestones and _step(path) % milestones == 0
            if not is_milestone and path not in chosen:
                _delete(path)
        elif _good(path, in_full=not kept):
            kept.append(path)
        elif kept:
            _delete(path)  # broken, and older than a good one


def _lowest(folder: Path, count: int, name: str) -> list[Path]:
    """The `count` checkpoints with the lowest number `name` in their notes, newer ones first."""
    found = []
    for path in checkpoints(folder) if count else ():
        if _good(path, in_full=False):
            try:
                value = manifest(path)["notes"].get(name)
            except NewerFormat:  # kept for the program that knows it
                continue
            if isinstance(value, float) and math.isfinite(value):
                found.append((value, path))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])[:count]]


def _good(path: Path, in_full: bool) -> bool:
    try:
        said = verify(path) if in_full else manifest(path)
        return path.stat().st_size == said["size"]
    except NewerFormat:
        return True
    except (StorageError, OSError):
        return False


def _delete(path: Path) -> None:
    with storing(path):
        path.with_suffix(".json").unlink(missing_ok=True)  # first, so that no manifest stands alone
        path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.stem)
    return int(match[1]) if match else 0


def _compare(path: Path, file: BinaryIO, said: Mapping[str, Any]) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != said["size"]:
        raise StorageError(f"{path}: broken: {size} bytes, its manifest says {said['size']}")
    sha256 = hashlib.sha256()
    while chunk := file.read(CHUNK):
        sha256.update(chunk)
    if sha256.hexdigest() != said["sha256"]:
        raise StorageError(f"{path}: broken: its SHA-256 is not that of its manifest")
