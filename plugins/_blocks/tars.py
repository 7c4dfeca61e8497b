"""Samples of tar shards by their places: nothing is unpacked, no name of a member becomes a path.

As in webdataset a member is KEY.ENDING, cut at the first dot of its last part, and members of one
key are one sample. An index.json as task=prepare writes it is believed; shards without one are read
through once, and what is found is kept.
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

from plugins._blocks.folders import identity, walk
from plugins._blocks.video_io import measured
from sandbox.contracts import BadItem, DataError, StorageError

INDEX, FORMAT = "index.json", 1
Look = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Member:
    """Bytes in a shard, for readers that take a path otherwise."""

    shard: Path
    offset: int
    size: int
    suffix: str

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """Raises BadItem."""
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
    """One sample: [offset, bytes] by ending, and the size of its media or why it has none."""

    shard: Path
    key: str
    places: dict[str, list[int]]
    look: Look | str | None = None

    def member(self, ending: str) -> Member:
        return Member(self.shard, *self.places[ending], f".{ending.rpartition('.')[2]}")


@dataclass(frozen=True)
class Shard:
    name: str  # below the root
    split: str | None  # "train", "val" or another, as the index or the name says
    entries: list[Entry]


def read_shards(root: Path, keep: Path, media: Sequence[str], looks: bool) -> list[Shard]:
    """All shards below `root` by name; indices that must be made are kept in the folder `keep`.

    looks: with the size of the first of `media` in each sample. Raises DataError for a shard that
    is missing or damaged, and StorageError where an index cannot be kept.
    """
    told = read_index(root / INDEX)
    names = sorted(n for n in walk(root) if n.lower().endswith(".tar"))
    if lost := sorted(told.keys() - set(names)):
        raise DataError(
            f"{root / INDEX}: {lost[0]!r} is not there ({len(lost)} such shards); copy what is "
            f"missing, or remove {INDEX} to use what is there"
        )
    unique = {identity(root / n): n for n in reversed(names)}.values()  # not a shard's second name

    def shard(name: str) -> Shard:
        if name in told:
            split, rows = told[name]
        else:
            split, rows = split_in(name), kept_rows(root / name, keep, media if looks else ())
        return Shard(name, split, [entry(root / name, row) for row in rows])

    with ThreadPoolExecutor() as pool:
        return [*pool.map(shard, sorted(unique))]


def entry(shard: Path, row: dict[str, Any]) -> Entry:
    look = row.get("look")
    return Entry(shard, row["key"], row["members"], tuple(look) if type(look) is list else look)


def split_in(name: str) -> str | None:
    """What a folder or the name of a shard says: train-00000.tar, val/0.tar, x-validation-1.tar."""
    found = re.findall(r"(?<![a-z])(train|val)(?:ing|id|idation)?(?![a-z])", name.lower())
    return found[-1] if found else None


def read_index(path: Path) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """{shard: (split, rows)}; nothing where there is no index of task=prepare. Raises DataError."""
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict) or "splits" not in index:
            return {}
        if index["format"] != FORMAT:
            raise DataError(f"{path}: its format is {index['format']}, want {FORMAT}")
        found = {}
        for split, shards in index["splits"].items():
            for told in shards:
                size = (path.parent / told["file"]).stat().st_size
                if size != told["bytes"]:
                    raise DataError(
                        f"{path.parent / told['file']} has {size} bytes, {path.name} says "
                        f"{told['bytes']}: copy it again"
                    )
                rows = [
                    {**row, "look": [row["frames"], row["height"], row["width"]]}
                    for row in told["samples"]
                ]
                found[told["file"]] = split, checked(rows, size)
        return found
    except FileNotFoundError as e:
        if e.filename == str(path):
            return {}
        raise DataError(f"{path}: {e.filename} is not there; copy what is missing") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); write it again") from e


def checked(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Raises ValueError where a row is none of a shard of `size` bytes."""
    for row in rows:
        os.fsencode(row["key"])
        for offset, count in row["members"].values():
            if not (type(offset) is type(count) is int and 0 <= offset <= offset + count <= size):
                raise ValueError(f"{row['key']!r} is at {offset}, {count}")
        look = row.get("look")
        if isinstance(look, list) and not all(type(n) is int and n > 0 for n in look):
            raise ValueError(f"{row['key']!r} has the size {look}")
    return rows


def kept_rows(path: Path, keep: Path, media: Sequence[str]) -> list[dict[str, Any]]:
    """The index of a shard, with sizes where `media` says of what; made where it is not kept."""
    about = path.stat()
    state = [FORMAT, str(path.resolve()), about.st_size, about.st_mtime_ns, *media]
    file = keep / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]}.json"
    if file.is_file():
        try:
            return checked(json.loads(file.read_bytes()), about.st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{file} is damaged ({e}); remove it, and it is made again") from e
    rows = scanned(path)
    for row in rows:
        if ending := first_of(media, row["members"]):
            row["look"] = look_at(entry(path, row).member(ending))
    try:
        keep.mkdir(parents=True, exist_ok=True)
        # Processes that make the same index each replace it whole.
        with tempfile.NamedTemporaryFile("w", dir=keep, suffix=".part", delete=False) as draft:
            json.dump(rows, draft)
        Path(draft.name).replace(file)
    except OSError as e:
        raise StorageError(
            f"data.index={keep}: {e.strerror or e}; name a folder that can be written"
        ) from e
    return rows


def first_of(media: Sequence[str], members: dict[str, Any]) -> str | None:
    return next((ending for ending in media if ending in members), None)


def look_at(member: Member) -> list[int] | str:
    try:
        return [*measured(member)]
    except BadItem as e:
        return str(e)


def scanned(path: Path) -> list[dict[str, Any]]:
    """Keys and places of all samples in the order of the shard; only plain files count.

    Raises DataError for a shard that is damaged or compressed, and where a member is there twice.
    """
    rows: dict[str, dict[str, list[int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    continue
                if not stem or not ending:
                    continue
                places = rows.setdefault(f"{folder}{slash}{stem}", {})
                if ending.lower() in places:
                    raise DataError(f"{path} has two members {member.name!r}; write it again")
                places[ending.lower()] = [member.offset_data, member.size]
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # which tarfile takes for the end
                raise DataError(f"{path} is damaged at byte {tar.offset}; write it again")
    except (tarfile.TarError, OSError) as e:
        raise DataError(
            f"{path} cannot be read: {e}; want a whole tar file that is not compressed"
        ) from e
    return [{"key": key, "members": places} for key, places in rows.items()]
