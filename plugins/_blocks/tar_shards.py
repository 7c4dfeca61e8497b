"""Samples of tar shards by offset: nothing is extracted, and no member name becomes a path.

As in webdataset a member is KEY.EXTENSION, split at the first dot of its base name, and members
with the same key form a sample. Shards without an index.json of task=prepare are scanned once and
their index is cached. Each read compares the member's header with the index, so that a shard that
was replaced is noticed, whatever its size and time.
"""

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plugins._blocks.folders import file_identity, files_below
from plugins._blocks.video_io import Size, media_size
from sandbox.contracts import BadItem, DataError, StorageError

INDEX, FORMAT = "index.json", 1
CACHED = 3  # version of a cached index; bump when clips are measured in another way
LOOKED_AT = 8  # headers of a shard that are compared when its cached index is read
LARGEST = 768 << 20  # bytes of a member that is read
LARGEST_TEXT, TEXTS = 16 << 20, (".txt", ".json", ".caption", ".cls")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """Bytes in a shard, with the part of Path's interface that `video_io.Media` needs."""

    shard: Path
    offset: int
    size: int
    suffix: str
    name: str = ""  # in the shard
    head: int | None = None  # CRC-32 of its header, in a cached index
    index: Path | None = None  # the cached index

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """Raises BadItem, and DataError where the shard is not the one that was indexed."""
        most = LARGEST_TEXT if self.suffix in TEXTS else LARGEST
        if self.size > most:
            raise BadItem(
                f"its member {self.suffix} has {self.size} bytes, more than {most}; write it again"
            )
        try:
            with self.shard.open("rb") as file:
                self.check(file)
                payload = file.read(self.size)
        except OSError as e:
            raise BadItem(f"{self.shard.name} cannot be read: {e}") from e
        if len(payload) != self.size:
            raise BadItem(f"{self.shard.name} ends before byte {self.offset + self.size}")
        return payload

    def check(self, file: BinaryIO) -> None:
        """Reads the header. Raises DataError where it is not the one of the index."""
        file.seek(self.offset - tarfile.BLOCKSIZE)
        header = file.read(tarfile.BLOCKSIZE)
        if self.head is not None:
            is_same = zlib.crc32(header) == self.head
        else:
            try:
                found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                is_same = (found.name, found.size) == (self.name, self.size)
            except tarfile.HeaderError:
                is_same = False
        if is_same or len(header) < tarfile.BLOCKSIZE:  # cut off: the read reports it
            return
        if self.index is None:
            raise DataError(f"{self.shard} is not the shard of {INDEX}: copy it again")
        self.index.unlink(missing_ok=True)
        raise DataError(f"{self.shard} has changed since it was indexed: run the command again")


@dataclass(frozen=True)
class Entry:
    """One sample: [offset, bytes, CRC-32 of the header] by extension.

    size: that of its media, or why that is unreadable.
    """

    shard: Path
    key: str
    members: dict[str, list[int]]
    size: Size | str | None = None
    problem: str | None = None  # why it has no members
    index: Path | None = None  # the cached one

    def member(self, ending: str) -> Member:
        offset, size, *head = self.members[ending]
        suffix, name = f".{ending.rpartition('.')[2]}", f"{self.key}.{ending}"
        return Member(self.shard, offset, size, suffix, name, *head, index=self.index)


@dataclass(frozen=True)
class Shard:
    name: str  # relative to the root
    split: str | None  # "train", "val" or another, from the index or the name
    entries: list[Entry]


def read_shards(
    root: Path, caches: Sequence[Path], media: Sequence[str], with_sizes: bool
) -> list[Shard]:
    """All shards below `root`, by name; indices of scanned shards are cached.

    caches: folders, of which the first that can be written is used; with_sizes: also the size of
    the first member of `media` in each sample. Raises DataError for a missing or damaged shard, and
    StorageError if an index cannot be cached.
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
            (split, rows), index = indexed[name], None
        else:
            rows, index = cached_rows(root / name, caches, media if with_sizes else ())
            split = split_from_name(name)
        return Shard(name, split, [entry(root / name, row, index) for row in rows])

    with ThreadPoolExecutor() as pool:
        return [*pool.map(shard, sorted(unique))]


def entry(shard: Path, row: dict[str, Any], index: Path | None = None) -> Entry:
    size = row.get("look")  # the key in cached indices
    size = tuple(size) if type(size) is list else size
    return Entry(shard, row["key"], row["members"], size, row.get("problem"), index)


def split_from_name(name: str) -> str | None:
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
                found[shard["file"]] = split, check_rows(rows, size)
        return found
    except FileNotFoundError as e:
        if e.filename == str(path):
            return {}
        raise DataError(f"{path}: {e.filename} is not there; copy what is missing") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is damaged ({type(e).__name__}: {e}); write it again") from e


def check_rows(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """`rows`. Raises ValueError for a row that does not fit a shard of `size` bytes."""
    for row in rows:
        os.fsencode(row["key"])
        for offset, count, *_ in row["members"].values():
            is_int = type(offset) is type(count) is int
            if not (is_int and tarfile.BLOCKSIZE <= offset <= offset + count <= size):
                raise ValueError(f"{row['key']!r} is at {offset}, {count}")
        found = row.get("look")
        if isinstance(found, list) and not all(type(n) is int and n > 0 for n in found):
            raise ValueError(f"{row['key']!r} has the size {found}")
    return rows


def cached_rows(
    path: Path, caches: Sequence[Path], media: Sequence[str]
) -> tuple[list[dict[str, Any]], Path | None]:
    """The rows of a shard, with sizes if `media` is not empty, and the file that caches them.

    A shard is scanned where its cached index is missing, damaged, or of other headers.
    """
    stat = path.stat()
    state = [CACHED, str(path.resolve()), stat.st_size, stat.st_mtime_ns, *media]
    name = f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:24]}.json"
    for file in (cache / name for cache in caches if (cache / name).is_file()):
        try:
            rows = check_rows(verify_rows(json.loads(file.read_bytes())), stat.st_size)
            check_members([entry(path, row, file) for row in rows], path)
            return rows, file
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            log.warning("%s: scanned again: its index %s is damaged (%s)", path, file, e)
        except DataError:
            log.warning("%s: scanned again: it has changed since it was indexed", path)
    rows = scan(path)
    for row in rows:
        if ending := first_ending(media, row["members"]):
            row["look"] = size_or_problem(entry(path, row).member(ending))
    content = json.dumps({"sha256": digest_of(rows), "rows": rows})
    reason: Any = ""
    for cache in caches:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Atomic: several processes may write the same index.
            with tempfile.NamedTemporaryFile("w", dir=cache, suffix=".part", delete=False) as draft:
                draft.write(content)
            Path(draft.name).replace(cache / name)
            return rows, cache / name
        except OSError as e:
            reason = e.strerror or e
    raise StorageError(f"data.index={caches[0]}: {reason}; want a writable folder")


def user_caches(name: str) -> list[Path]:
    """Folders for caches outside the current one: the user's, and one for temporary files."""
    found = [Path(tempfile.gettempdir(), f"latent-video-sandbox-{os.getuid()}")]
    with suppress(RuntimeError):  # no home
        user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        found.insert(0, Path(user, "latent-video-sandbox"))
    return [folder / name for folder in found]


def digest_of(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def verify_rows(cached: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a cached index. Raises ValueError where its hash differs."""
    if cached["sha256"] != digest_of(cached["rows"]):
        raise ValueError("another hash")
    return cached["rows"]


def check_members(entries: list[Entry], path: Path) -> None:
    """Compares some headers, the first and the last included. Raises DataError, OSError."""
    members = [entry.member(ending) for entry in entries for ending in entry.members]
    places = {i * (len(members) - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}
    with path.open("rb") as file:
        for place in sorted(places) if members else ():
            members[place].check(file)


def first_ending(media: Sequence[str], members: dict[str, Any]) -> str | None:
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
                file.seek(member.offset_data - tarfile.BLOCKSIZE)
                places[ending.lower()].append(zlib.crc32(file.read(tarfile.BLOCKSIZE)))
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile ends silently at a damaged header
                raise DataError(f"{path} is damaged at byte {tar.offset}; write it again")
    except (tarfile.TarError, OSError) as e:
        raise DataError(
            f"{path} cannot be read: {e}; want a complete, uncompressed tar file"
        ) from e
    found = [{"key": key, "members": places} for key, places in rows.items()]
    return [*found, *({**row, "members": {}} for row in others)]
