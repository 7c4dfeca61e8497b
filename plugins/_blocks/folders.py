"""Data folders: the root, the files below it, and the split into training and validation."""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sandbox.contracts import DataConfig, DataError

T = TypeVar("T")
REASONS = 8  # that a summary names
MOST_FILES = 200_000  # that are compared with a list

log = logging.getLogger(__name__)


def folder_of(cfg: DataConfig) -> Path:
    """The folder `data.root`. Raises DataError if it is not set or does not exist."""
    if cfg.root is None:
        raise DataError("data.root=null: set data.root=FOLDER, the folder of the data")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root={cfg.root}: no such folder; want the folder of the data")
    return root


def inside(root: Path, name: str) -> str | None:
    """`name` relative to `root`, also of an absolute path in it; None for a path outside."""
    path = PurePosixPath(name)
    if path.is_absolute():
        bases = [PurePosixPath(base) for base in (root.absolute(), root.resolve())]
        base = next((b for b in bases if path.is_relative_to(b)), None)
        if base is None:
            return None
        path = path.relative_to(base)
    return None if ".." in path.parts else path.as_posix()


def check_split(name: str) -> None:
    """Raises ValueError unless `name` is "train" or "val"."""
    if name not in ("train", "val"):
        raise ValueError(f"split {name!r}: want 'train' or 'val'")


@cache
def print_once(text: str) -> None:
    """Logs a warning, once for each text in a process."""
    log.warning(text)


class Unused(dict[str, int]):
    """Reason -> number of files or samples that are not used."""

    def add(self, reason: str, count: int = 1) -> None:
        if count:
            self[reason] = self.get(reason, 0) + count

    def add_file(self, name: str) -> None:
        """A file that nothing reads."""
        suffix = PurePosixPath(name).suffix.lower()
        self.add(f"{suffix} files, which are not read" if suffix else "files without an extension")

    def summary(self) -> str:
        """ ", 2 .wmv files, which are not read" for each reason, the most frequent first."""
        ordered = sorted(self.items(), key=lambda item: -item[1])
        shown = ordered[:REASONS]
        if rest := sum(count for _, count in ordered[REASONS:]):
            shown.append(("others", rest))
        return "".join(f", {n} {why}" for why, n in shown)

    def report(self, cfg: DataConfig) -> None:
        """Logs what is not used, where there is something."""
        if self:
            print_once(f"data.root={cfg.root}: excluded{self.summary()}")


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
    """The rows of "train" or "val", in order; rows with the same name stay together.

    Where all have one name, they are in both.
    """
    names = {name_of(row) for row in rows}
    if len(names) == 1:
        print_once(f"there is only {min(names)!r}: it is used for training and for validation")
        return [*rows]
    held = held_out(names, fraction)
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


def unlisted(root: Path, listed: Collection[str], endings: Collection[str]) -> Unused:
    """Files of these `endings` below `root` that `listed` does not name.

    Of a very large folder only the first files are looked at.
    """
    unused = Unused()
    for name in islice(files_below(root), MOST_FILES):
        if PurePosixPath(name).suffix.lower() in endings and name not in listed:
            unused.add("files that no list names")
    return unused


def file_identity(path: Path) -> object:
    """A key shared by all names of the same file; for a broken link, its own path."""
    try:
        info = path.stat()
    except OSError:
        return path
    return info.st_dev, info.st_ino
