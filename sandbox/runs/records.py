"""Small files of a run folder that are read again: each read verifies their SHA-256.

environment.json has, under "hashes", the hash of each file and that of the version before it, and
a hash of itself. It is written first, so that a kill between both leaves a valid folder. Files
without a hash, as earlier versions of this program have left them, are read as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox.config.secrets import without_secrets
from sandbox.contracts import StorageError
from sandbox.storage.atomic import (
    HASH_KEY,
    digest_of,
    has_right_hash,
    storage_errors,
    write_atomic,
    write_with_hash,
)

HASHES, KEY = "environment.json", "hashes"


def write(folder: Path, name: str, text: str) -> None:
    """Writes a file and its hash, each atomically. Raises StorageError."""
    known, text = _hashes(folder), without_secrets(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with storage_errors(folder / name):
        _write_hashes(folder, {**known, name: [digest, *known.get(name, [])[:1]]})
        write_atomic(folder / name, text)


def write_dict(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """`write` of a dict as JSON."""
    text = json.dumps(content, indent=1, default=str)
    if name != HASHES:
        write(folder, name, text + "\n")
        return
    with storage_errors(folder / name):
        _write_environment(folder, json.loads(text) | {KEY: _hashes(folder)})


def read(folder: Path, name: str) -> str:
    """The text of a file. Raises StorageError where it is missing, unreadable or damaged."""
    path = folder / name
    try:
        content = path.read_bytes()
        check_hash(folder, name, hashlib.sha256(content).hexdigest())
        return content.decode()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read ({e.strerror or e})") from e
    except UnicodeDecodeError as e:
        raise StorageError(f"{path}: damaged (not a text); restore it from a backup") from e


def read_dict(folder: Path, name: str) -> dict[str, Any]:
    """The dict in a JSON file; empty where there is no file. Raises StorageError otherwise."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(read(folder, name))
        if not isinstance(found, dict):
            raise ValueError("not an object")
        if name == HASHES and HASH_KEY in found and not has_right_hash(found):
            raise ValueError("its SHA-256 is another")
    except (ValueError, RecursionError) as e:
        raise StorageError(f"{path}: damaged ({e}); restore it from a backup") from e
    return {k: v for k, v in found.items() if name != HASHES or k not in (KEY, HASH_KEY)}


def add_hash(folder: Path, name: str) -> None:
    """Records the hash of a file that is complete. Raises StorageError."""
    with storage_errors(folder / name):
        if (folder / name).is_file():
            _write_hashes(folder, {**_hashes(folder), name: [digest_of(folder / name)]})


def remove_hash(folder: Path, name: str) -> None:
    """Removes the hash of a file that is written again. Raises StorageError."""
    known = _hashes(folder)
    if name in known:
        with storage_errors(folder / name):
            _write_hashes(folder, {k: v for k, v in known.items() if k != name})


def check_hash(folder: Path, name: str, digest: str | None = None) -> None:
    """Raises StorageError where the hash of a file is not the recorded one."""
    recorded = _hashes(folder).get(name) if name != HASHES else None
    if recorded and (digest or digest_of(folder / name)) not in recorded:
        raise StorageError(
            f"{folder / name}: damaged or edited: its SHA-256 is not in {HASHES}; restore it and "
            f"change settings on the command line, or remove {HASHES} to use it as it is"
        )


def _hashes(folder: Path) -> dict[str, list[str]]:
    read_dict(folder, HASHES)  # raises where it is damaged
    path = folder / HASHES
    found = json.loads(path.read_text(encoding="utf-8")).get(KEY) if path.is_file() else {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, list)}


def _write_hashes(folder: Path, hashes: Mapping[str, Any]) -> None:
    _write_environment(folder, read_dict(folder, HASHES) | {KEY: hashes})


def _write_environment(folder: Path, content: dict[str, Any]) -> None:
    write_with_hash(folder / HASHES, content, indent=1)
