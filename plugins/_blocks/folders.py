"""Folders of data: the root, the names of files below it, and which of them are held out."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox.contracts import DataConfig, DataError


def folder_of(cfg: DataConfig) -> Path:
    """The folder `data.root`. Raises DataError where there is none."""
    if cfg.root is None:
        raise DataError("data.root=null: set data.root=FOLDER, the folder of the data")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={cfg.root}: no such folder; name that of the data")
    return root


def held_out(names: list[str], fraction: float) -> set[str]:
    """About `fraction` of the names, by their hashes: other files do not change a file's side.

    Of two or more names at least one is on each side.
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


def walk(root: Path) -> Iterator[str]:
    """Names of all files below `root`; a folder that a link leads back to is entered once."""
    entered: set[object] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if (same := identity(Path(folder))) in entered:
            folders.clear()
            continue
        entered.add(same)
        for file in files:
            if not file.startswith("."):
                yield Path(folder, file).relative_to(root).as_posix()


def identity(path: Path) -> object:
    """The same for all names of a file; a broken link is itself."""
    try:
        info = path.stat()
    except OSError:
        return path
    return info.st_dev, info.st_ino
