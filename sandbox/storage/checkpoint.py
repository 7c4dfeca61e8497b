"""Atomic, verified checkpoints.

A checkpoint is a file `step_00001200.ckpt` and its manifest `step_00001200.json`. The file is
written under a temporary name, hashed while it is written, and synced; then the manifest (SHA-256,
size, step, format) is written, and the file gets its name last. So a kill at any moment leaves the
older checkpoints intact, and a file without a manifest is damage. No file is overwritten: saving
the same step again gives `step_00001200-2`. Loading verifies size and hash, and accepts only
tensors and plain containers.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch

from sandbox.contracts import ConfigError, StorageError
from sandbox.storage.atomic import storage_errors, sync_folder, write_atomic
from sandbox.storage.weight_files import check_savable, load_plain, opened

FORMAT = 1  # of file and manifest; a program reads its own format and older ones
NAME = re.compile(r"step_(\d+)(?:-(\d+))?")
CHUNK = 1 << 22
LARGE = 1 << 18  # bytes; smaller pieces are hashed on the writing thread

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

    `notes` are stored in the manifest (JSON). A failed write is retried, up to `attempts` times in
    all, `wait` seconds apart. Raises Diverged for a tensor that is not finite, TypeError for a type
    that cannot be loaded again, StorageError for a failed write. Earlier checkpoints stay intact.
    """
    check_savable(dict(state))
    for left in reversed(range(attempts)):
        try:
            return _write(folder, dict(state), step, dict(notes or {}))
        except OSError as e:
            reason = e.strerror or e
            if not left:
                raise StorageError(
                    f"{folder}: the checkpoint of step {step} cannot be written ({reason}, "
                    f"{attempts} attempts); earlier ones are intact; "
                    "free some space and run the same command again"
                ) from e
            log.warning("checkpoint of step %d: %s; trying again in %g s", step, reason, wait)
            time.sleep(wait)
    raise ValueError(f"attempts={attempts}: want >= 1")


def save_and_prune(
    folder: Path,
    state: Mapping[str, Any],
    step: int,
    policy: Any,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """`save`, then `prune`, with the settings of a `checkpoint` plugin's Config."""
    path = save(folder, state, step, notes=notes, attempts=policy.attempts, wait=policy.wait)
    prune(folder, policy.keep, policy.milestones, policy.best, policy.best_of)
    return path


def _write(folder: Path, state: dict[str, Any], step: int, notes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for orphan in folder.glob(".*.part"):  # of a killed writer; a run folder has one writer
        unfinished = orphan.with_name(orphan.name[1:]).with_suffix("")
        if unfinished.suffix == ".ckpt" and not unfinished.exists():
            unfinished.with_suffix(".json").unlink(missing_ok=True)
        orphan.unlink(missing_ok=True)
    path = _unused(folder, step)
    part = _part(path)
    try:
        with part.open("wb") as file, ThreadPoolExecutor(1) as pool:
            hashed = _HashedFile(file, pool)
            try:
                torch.save(state, hashed)  # pyright: ignore[reportArgumentType]
            except RuntimeError as e:  # torch's writer replaces the file's own error
                raise hashed.error or e from None
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "format": FORMAT,
            "step": step,
            "file": path.name,
            "size": hashed.size,
            "sha256": hashed.sha256.hexdigest(),
            "notes": notes,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
        part.rename(path)
        sync_folder(folder)
    except BaseException:  # also a KeyboardInterrupt
        path.with_suffix(".json").unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    return path


def _part(path: Path) -> Path:
    """The temporary name of a checkpoint."""
    return path.with_name(f".{path.name}.part")


class _HashedFile:
    """A file that hashes what is written, so that no second copy is made or read.

    Large pieces are hashed on another thread during the write.
    """

    def __init__(self, file: BinaryIO, pool: Executor) -> None:
        self.file, self.pool, self.sha256, self.size = file, pool, hashlib.sha256(), 0
        self.flush = file.flush
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


def _unused(folder: Path, step: int) -> Path:
    taken = {p.stem for p in folder.glob(f"step_{step:08d}*")}
    suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    stems = (f"step_{step:08d}{suffix}" for suffix in suffixes)
    return folder / f"{next(stem for stem in stems if stem not in taken)}.ckpt"


# --- reading --------------------------------------------------------------------------------------


class NewerFormat(StorageError):
    """A checkpoint of a later version of this program; never skipped, as that would lose work."""


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises StorageError."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if isinstance(found["format"], int) and found["format"] > FORMAT:
            raise NewerFormat(
                f"{path}: format {found['format']}, but this program reads up to {FORMAT}; "
                "use the version that wrote it, or resume=never"
            )
        if not isinstance(found["notes"], dict):
            raise TypeError("its notes")
        return {k: found[k] for k in ("format", "step", "file", "size", "sha256", "notes")}
    except FileNotFoundError:
        raise StorageError(f"{path}: it has no manifest; copy it again, or remove it") from None
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as e:
        raise StorageError(
            f"{path.with_suffix('.json')}: not the manifest of a checkpoint ({e!r})"
        ) from e


@contextmanager
def _verified(path: Path) -> Iterator[tuple[BinaryIO, dict[str, Any]]]:
    """The file and its manifest; its SHA-256 is computed in a thread while the block reads it.

    Raises StorageError where the size, or after the block the hash, is not that of the manifest;
    this error comes before one of the block.
    """
    recorded = manifest(path)
    with opened(path) as file, ThreadPoolExecutor(1) as pool:
        size = os.fstat(file.fileno()).st_size
        if size != recorded["size"]:
            raise StorageError(
                f"{path}: broken: {size} bytes, its manifest says {recorded['size']}"
            )
        hashing = pool.submit(_sha256, file.fileno())
        try:
            yield file, recorded
        finally:
            if _result(path, hashing) != recorded["sha256"]:
                raise StorageError(f"{path}: broken: its SHA-256 is not that of its manifest")


def _sha256(descriptor: int) -> str:
    """The SHA-256 of an open file; does not move its position."""
    sha256, offset, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    while count := os.preadv(descriptor, [buffer], offset):
        sha256.update(buffer[:count])
        offset += count
    return sha256.hexdigest()


def _result(path: Path, hashing: Future[str]) -> str:
    try:
        return hashing.result()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e.strerror or e})") from e


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after a check of the file's size and SHA-256. Raises StorageError."""
    with _verified(path) as (_, recorded):
        return recorded


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The saved state. Raises StorageError where file and manifest do not match."""
    with _verified(path) as (file, _):
        state = load_plain(path, file, device)
    return state


def load_mapped(path: Path) -> dict[str, Any]:
    """The state with memory-mapped tensors, for names and shapes; the hash is not verified.

    Raises StorageError.
    """
    manifest(path)
    with opened(path) as file:
        return load_plain(path, file, "cpu", mapped=True)


def newest(folder: Path) -> Path | None:
    """The newest valid checkpoint; None in a folder without checkpoints.

    Logs broken ones. Raises NewerFormat, and StorageError where all are broken.
    """
    return _newest(folder, lambda path: (verify(path), path)[1])


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest valid checkpoint, also while a run prunes them; else as `newest`."""
    return _newest(folder, load)


def _newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the newest checkpoint that it accepts; raises as `newest`."""
    broken: dict[Path, str] = {}
    unfinished: set[Path] = set()
    # The folder is listed again for each: a run may prune it.
    while left := [p for p in checkpoints(folder) if p not in broken and p not in unfinished]:
        path = left[0]
        if not path.exists() and _part(path).exists():  # its write was interrupted
            unfinished.add(path)
            continue
        try:
            return read(path)
        except NewerFormat:
            raise
        except StorageError as e:
            log.warning("skipped checkpoint: %s", e)
            broken[path] = str(e)
    if broken:
        raise StorageError(
            f"{folder}: all checkpoints of this run are broken, {len(broken)} in all "
            f"({next(iter(broken.values()))}); nothing was changed. Copy them from a backup, or "
            "start a new run with resume=never"
        )
    return None


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step. Raises ConfigError, which lists the steps that exist."""
    path = next((path for path in checkpoints(folder) if _step(path) == step), None)
    if path is None:
        steps = ", ".join(map(str, steps_in(folder))) or "none"
        raise ConfigError(f"task.step={step}: {folder} has no such checkpoint; want {steps}")
    return path


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first."""
    return list(dict.fromkeys(_step(path) for path in checkpoints(folder)))


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in a folder, newest first, valid or broken."""
    found = {}
    for path in folder.glob("step_*"):
        match = NAME.fullmatch(path.stem)
        if match and path.suffix in (".ckpt", ".json"):
            found[int(match[1]), int(match[2] or 1)] = path.with_suffix(".ckpt")
    return [path for _, path in sorted(found.items(), reverse=True)]


def prune(folder: Path, keep: int, milestones: int = 0, best: int = 0, best_of: str = "") -> None:
    """Keeps the `keep` newest checkpoints, those of each `milestones`-th step (0: none), and the
    `best` ones with the lowest `best_of` in their notes; deletes the others.

    Deletes nothing before it has verified a newer checkpoint, so the last valid one stays.
    """
    kept: list[Path] = []
    chosen = _lowest(folder, best, best_of)
    for path in checkpoints(folder):
        if len(kept) >= max(keep, 1):
            is_milestone = milestones and _step(path) % milestones == 0
            if not is_milestone and path not in chosen:
                _delete(path)
        elif _is_valid(path, in_full=not kept):
            kept.append(path)
        elif kept:
            _delete(path)  # broken, and older than a valid one


def _lowest(folder: Path, count: int, name: str) -> list[Path]:
    """The `count` checkpoints with the lowest `name` in their notes, the newest first if equal."""
    found = []
    for path in checkpoints(folder) if count else ():
        if _is_valid(path, in_full=False):
            try:
                value = manifest(path)["notes"].get(name)
            except NewerFormat:  # kept for the program that reads it
                continue
            if isinstance(value, float) and math.isfinite(value):
                found.append((value, path))
    return [path for _, path in sorted(found, key=lambda pair: pair[0])[:count]]


def _is_valid(path: Path, in_full: bool) -> bool:
    try:
        recorded = verify(path) if in_full else manifest(path)
        return path.stat().st_size == recorded["size"]
    except NewerFormat:
        return True
    except (StorageError, OSError):
        return False


def _delete(path: Path) -> None:
    with storage_errors(path):
        path.with_suffix(".json").unlink(missing_ok=True)  # first: no manifest without its file
        path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.stem)
    return int(match[1]) if match else 0
