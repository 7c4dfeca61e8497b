"""Samples of tar shards by offset: nothing is extracted, and no member name becomes a path.

As in webdataset a member is KEY.EXTENSION, split at the first dot of its base name, and members
with the same key form a sample. An index.json written by task=prepare is trusted; other shards are
scanned once and their index is cached.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plugins._blocks.folders import file_identity, files_below
from plugins._blocks.video_io import Size, media_size
from sandbox.contracts import BadItem, DataError, StorageError

INDEX, FORMAT = "index.json", 1
SCAN = 2  # version of cached indices; bump when the sizes of clips are measured otherwise
LARGEST = 768 << 20  # bytes of a member that is read
LARGEST_TEXT, TEXTS = 16 << 20, (".txt", ".json", ".caption", ".cls")


@dataclass(frozen=True)
class Member:
    """Bytes in a shard, with the part of Path's interface that `video_io.Media` needs."""

    shard: Path
    offset: int
    size: int
    suffix: str

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """Raises BadItem."""
        most = LARGEST_TEXT if self.suffix in TEXTS else LARGEST
        if self.size > most:
            raise BadItem(
                f"its member {self.suffix} has {self.size} bytes, more than {most}; write it again"
            )
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                payload = file.read(self.size)
        except OSError as e:
            raise BadItem(f"{self.shard.name} cannot be read: {e}") from e
        if len(payload) != self.size:
            raise BadItem(f"{self.shard.name} ends before byte {self.offset + self.size}")
        return payload


@dataclass(frozen=True)
class Entry:
    """One sample: [offset, bytes] by extension, and its media's size or why that is unreadable."""

    shard: Path
    key: str
    members: dict[str, list[int]]
    size: Size | str | None = None
    problem: str | None = None  # why it has no members

    def member(self, ending: str) -> Member:
        offset, size = self.members[ending]
        return Member(self.shard, offset, size, f".{ending.rpartition('.')[2]}")


@dataclass(frozen=True)
class Shard:
    name: str  # relative to the root
    split: str | None  # "train", "val" or another, from the index or the name
    entries: list[Entry]


def read_shards(root: Path, cache: Path, media: Sequence[str], with_sizes: bool) -> list[Shard]:
    """All shards below `root`, by name; indices of scanned shards are cached in `cache`.

    with_sizes: also the size of the first member of `media` in each sample. Raises DataError for a
    missing or damaged shard, and StorageError if an index cannot be cached.
    """
    indexed = read_index(root / INDEX)
    names = sorted(n for n in files_below(root) if n.lower().endswith(".tar"))
    if missing := sorted(indexed.keys() - set(names)):
        raise DataError(
            f"{root / INDEX}: {missing[0]!r} is not there ({len(missing)} such shards); copy what "
            f"is missing, or remove {INDEX} to use what is there"
        )
    unique = {file_identity(root / n): n for n in reversed(names)}.values()  # one name per file

    def shard(name: str) -> Shard:
        if name in indexed:
            split, rows = indexed[name]
        else:
            rows = cached_rows(root / name, cache, media if with_sizes else ())
            split = split_in(name)
        return Shard(name, split, [entry(root / name, row) for row in rows])

    with ThreadPoolExecutor() as pool:
        return [*pool.map(shard, sorted(unique))]


def entry(shard: Path, row: dict[str, Any]) -> Entry:
    size = row.get("look")  # the key in cached indices
    size = tuple(size) if type(size) is list else size
    return Entry(shard, row["key"], row["members"], size, row.get("problem"))


def split_in(name: str) -> str | None:
    """The split in a shard's path: train-00000.tar, val/0.tar, x-validation-1.tar."""
    found = re.findall(r"(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", name.lower())
    return found[-1] if found else None


def read_index(path: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Shard -> (split, rows); empty without an index of task=prepare. Raises DataError."""
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict) or "splits" not in index:
            return {}
        if index["format"] != FORMAT:
            raise DataError(f"{path}: its format is {index['format']}, want {FORMAT}")
        found = {}
        for split, shards in index["splits"].items():
            for shard in shards:
                size = (path.parent / shard["file"]).stat().st_size
                if size != shard["bytes"]:
                    raise DataError(
                        f"{path.parent / shard['file']} has {size} bytes, want {shard['bytes']} "
                        f"from {path.name}: copy it again"
                    )
                rows = [
                    {**row, "look": [row["frames"], row["height"], row["width"]]}
                    for row in shard["samples"]
                ]
                found[shard["file"]] = split, checked(rows, size)
        return found
    except FileNotFoundError as e:
        if e.filename == str(path):
            return {}
        raise DataError(f"{path}: {e.filename} is not there; copy what is missing") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); write it again") from e


def checked(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """`rows`. Raises ValueError for a row that does not fit a shard of `size` bytes."""
    for row in rows:
        os.fsencode(row["key"])
        for offset, count in row["members"].values():
            if not (type(offset) is type(count) is int and 0 <= offset <= offset + count <= size):
                raise ValueError(f"{row['key']!r} is at {offset}, {count}")
        found = row.get("look")
        if isinstance(found, list) and not all(type(n) is int and n > 0 for n in found):
            raise ValueError(f"{row['key']!r} has the size {found}")
    return rows


def cached_rows(path: Path, cache: Path, media: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a shard from the cache, else by a scan; with sizes if `media` is not empty."""
    stat = path.stat()
    state = [SCAN, str(path.resolve()), stat.st_size, stat.st_mtime_ns, *media]
    file = cache / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]}.json"
    if file.is_file():
        try:
            return checked(json.loads(file.read_bytes()), stat.st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{file} is damaged ({e}); remove it to scan the shard again") from e
    rows = scan(path)
    for row in rows:
        if ending := first_of(media, row["members"]):
            row["look"] = size_or_problem(entry(path, row).member(ending))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Atomic: several processes may write the same index.
        with tempfile.NamedTemporaryFile("w", dir=cache, suffix=".part", delete=False) as draft:
            json.dump(rows, draft)
        Path(draft.name).replace(file)
    except OSError as e:
        raise StorageError(f"data.index={cache}: {e.strerror or e}; want a writable folder") from e
    return rows


def first_of(media: Sequence[str], members: dict[str, Any]) -> str | None:
    return next((ending for ending in media if ending in members), None)


def size_or_problem(member: Member) -> list[int] | str:
    try:
        return [*media_size(member)]
    except BadItem as e:
        return str(e)


def scan(path: Path) -> list[dict[str, Any]]:
    """Keys and members of all samples, in the order of the shard.

    Members that cannot be part of a sample have a row each, with a "problem".
    Raises DataError for a damaged or compressed shard, and for a repeated member.
    """
    rows: dict[str, dict[str, list[int]]] = {}
    others: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    others.append({"key": member.name, "problem": "links or special members"})
                    continue
                if not stem:  # hidden
                    continue
                if not ending:
                    others.append({"key": member.name, "problem": "members without an extension"})
                    continue
                places = rows.setdefault(f"{folder}{slash}{stem}", {})
                if ending.lower() in places:
                    raise DataError(f"{path} has two members {member.name!r}; write it again")
                places[ending.lower()] = [member.offset_data, member.size]
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile ends silently at a damaged header
                raise DataError(f"{path} is damaged at byte {tar.offset}; write it again")
    except (tarfile.TarError, OSError) as e:
        raise DataError(
            f"{path} cannot be read: {e}; want a complete, uncompressed tar file"
        ) from e
    found = [{"key": key, "members": places} for key, places in rows.items()]
    return [*found, *({**row, "members": {}} for row in others)]
