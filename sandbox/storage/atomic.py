"""Atomic writes: a reader sees the old file or the new one, whenever the writer is killed."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sandbox.config.secrets import without_secrets
from sandbox.contracts import ConfigError, StorageError

MB = 1_000_000
HASH_KEY = "sha256"  # key of a JSON object with the hash of the rest


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
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as e:
        raise StorageError(
            f"{path}: cannot be written ({e.strerror or e}); "
            "check free space, quota and permissions, or choose another out="
        ) from e


def reserve_path(paths: Iterable[Path]) -> Path:
    """Creates the first of `paths` that does not exist, as an empty file. Raises StorageError.

    Jobs that start together get one each.
    """
    for path in paths:
        with storage_errors(path), suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
            return path
    raise ValueError("all paths exist")


def is_writable(folder: Path) -> bool:
    """Whether files can be written to `folder`, or the folder can be created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_writable(folder: Path, setting: str) -> None:
    """Raises ConfigError, which names `setting`, for a folder that cannot be written."""
    if not is_writable(folder):
        raise ConfigError(f"{setting}={folder}: cannot be written; choose another folder")


def check_space(folder: Path, size: int, what: str) -> None:
    """Raises StorageError where less than `size` bytes are free, the least that `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageError(
            f"{folder}: {free // MB} MB are free, {what} needs at least {size // MB} MB; free some "
            "space, or choose another out="
        )


def with_hash(content: dict[str, Any]) -> dict[str, Any]:
    """The dict with a hash of its JSON under HASH_KEY."""
    rest = {k: v for k, v in content.items() if k != HASH_KEY}
    return rest | {HASH_KEY: hashlib.sha256(json.dumps(rest).encode()).hexdigest()}


def write_with_hash(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Writes a dict with its hash as JSON, atomically and without secrets. Raises OSError."""
    written = json.loads(without_secrets(json.dumps(content)))  # the hash is of what is written
    write_atomic(path, json.dumps(with_hash(written), indent=indent) + "\n")


def has_right_hash(content: dict[str, Any]) -> bool:
    """Whether the hash that `with_hash` has added is right."""
    return with_hash(content) == content


def digest_of(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
