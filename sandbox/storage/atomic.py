"""Atomic writes: a reader sees the old file or the new one, whenever the writer is killed."""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandbox.config.secrets import without_secrets
from sandbox.contracts import ConfigError, StorageError


def sync_folder(folder: Path) -> None:
    """Makes renames and deletions in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; its file replaces `path` after the block.

    A block that fails leaves `path` unchanged and no temporary file. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Writes the text atomically, without secrets. Raises OSError."""
    with replacing(path) as part:
        part.write_text(without_secrets(text), encoding="utf-8")


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as e:
        raise StorageError(
            f"{path}: cannot be written ({e.strerror or e}); "
            "check free space, quota and permissions, or choose another out="
        ) from e


def claimed(paths: Iterable[Path]) -> Path:
    """Creates the first of `paths` that does not exist, as an empty file. Raises StorageError.

    Jobs that start together get one each.
    """
    for path in paths:
        with storing(path), suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            return path
    raise ValueError("all paths exist")


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, setting: str = "cache") -> Iterator[None]:
    """Lets one process at a time into the block; the others log that they wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise ConfigError(
            f"{setting}={path.parent}: cannot be written ({e.strerror}); choose another folder"
        ) from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that writes {path.name}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
