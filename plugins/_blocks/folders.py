"""Data folders: the root, the files below it, and the split into training and validation."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sandbox.contracts import DataConfig, DataError

T = TypeVar("T")


def folder_of(cfg: DataConfig) -> Path:
    """The folder `data.root`. Raises DataError if it is not set or does not exist."""
    if cfg.root is None:
        raise DataError("data.root=null: set data.root=FOLDER, the folder of the data")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={cfg.root}: no such folder; want the folder of the data")
    return root


def check_split(name: str) -> None:
    """Raises ValueError unless `name` is "train" or "val"."""
    if name not in ("train", "val"):
        raise ValueError(f"split {name!r}: want 'train' or 'val'")


def held_out(names: Collection[str], fraction: float) -> set[str]:
    """About `fraction` of the names, chosen by hash: adding names does not move others.

    With two or more names, each side gets at least one.
    """
    if len(names) < 2:
        return set()
    places = {
        n: int.from_bytes(hashlib.blake2b(os.fsencode(n), digest_size=8).digest()) / 2**64
        for n in names
    }
    ordered = sorted(names, key=lambda n: (places[n], n))
    count = sum(p < fraction for p in places.values())
    return set(ordered[: min(max(count, 1), len(names) - 1)])


def split_by_hash(
    rows: Sequence[T], name_of: Callable[[T], str], fraction: float, split: str
) -> list[T]:
    """The rows of "train" or "val", in order; rows with the same name stay together."""
    held = held_out({name_of(row) for row in rows}, fraction)
    return [row for row in rows if (name_of(row) in held) == (split == "val")]


def printable(name: str) -> str:
    """`name` with unprintable characters escaped."""
    return repr(name)[1:-1]


def files_below(root: Path) -> Iterator[str]:
    """Names of all files below `root`, following links; hidden files and folders are skipped.

    A folder that can be reached in several ways is entered once.
    """
    entered: set[object] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if (identity := file_identity(Path(folder))) in entered:
            folders.clear()
            continue
        entered.add(identity)
        for file in files:
            if not file.startswith("."):
                yield Path(folder, file).relative_to(root).as_posix()


def file_identity(path: Path) -> object:
    """A key shared by all names of the same file; for a broken link, its own path."""
    try:
        info = path.stat()
    except OSError:
        return path
    return info.st_dev, info.st_ino
