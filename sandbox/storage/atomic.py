"""Durable small files: a reader sees the old one or the new one, whenever the writer is killed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """A name beside `path`, of this writer alone, whose file takes its place after the block.

    A block that fails leaves `path` as it was, and no temporary file. Raises OSError.
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
    """The text in place of what `path` held, whole or not at all. Raises OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


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
    """The first of `paths` that is not there, now an empty file: jobs that come at once have one
    each. Raises StorageError.
    """
    return next(path for path in paths if _made(path))


def _made(path: Path) -> bool:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, setting: str = "cache") -> Iterator[None]:
    """One process at a time works on `path`; the others wait, and say so."""
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
            print(f"waiting for another run that makes {path.name}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
