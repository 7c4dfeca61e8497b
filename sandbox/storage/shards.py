"""Tensors by key in tar files that can be appended to after a kill.

`STEM-00000.tar`, ... are webdataset shards with a member KEY.safetensors per key. STEM.jsonl has a
line per member: key, file, offset, size and CRC-32. A member is synced to disk before its line is
written, so a kill loses at most the member in progress.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sandbox.storage.atomic import storage_errors

if TYPE_CHECKING:
    from torch import Tensor

Place = list[Any]  # [file, offset, bytes, crc]
END = bytes(1024)  # of a tar file


class Journal:
    """An append-only file of JSON lines; opening it drops a line that a kill has cut off."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, [*read_journal(path)]
        with storage_errors(path):
            self._file = path.open("ab")
            self._file.truncate(sum(len(_line(row)) for row in self.rows))

    def add(self, row: Any) -> None:
        """Appends a row and syncs it to disk."""
        with storage_errors(self.path):
            _write(self._file, _line(row))
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[Any]:
    """The rows of a journal up to the first incomplete one; none where there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if _line(row) != line:
                return
            yield row


class Shards:
    """The only writer of the shards `stem` in `folder`; `places` has the place of every key so far.

    A shard has at least one member, and no more than `shard_bytes` of them.
    """

    def __init__(self, folder: Path, stem: str, shard_bytes: int) -> None:
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self.journal = Journal(folder / f"{stem}.jsonl")
        rows = [row for row in self.journal.rows if _is_member(row)]
        self.places = present(folder, rows)
        numbers = [int(row[1].rpartition("-")[2][:-4]) for row in rows]
        self._number = max(numbers, default=0)
        here = [p for p in self.places.values() if p[0] == self._name()]
        if not here and numbers:  # its file is gone
            self._number += 1
        self._begin(max((_end(p) for p in here), default=0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._finish()
        self.journal.close()

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> Place:
        """Stores tensors under `key`, a valid file name, and syncs them to disk.

        Raises StorageError for a failed write.
        """
        from safetensors.torch import save

        return self.put(key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def put(self, key: str, payload: bytes) -> Place:
        """Stores the bytes of a member as `add` does."""
        member = tarfile.TarInfo(f"{key}.safetensors")
        member.size = len(payload)
        head = member.tobuf(tarfile.USTAR_FORMAT)
        if self._at and self._at + len(head) + len(payload) > self.shard_bytes:
            self.begin_shard()
        place = [self._name(), self._at + len(head), len(payload), zlib.crc32(payload)]
        with storage_errors(self.folder / self._name()):
            _write(self._file, head + payload + bytes(-len(payload) % tarfile.BLOCKSIZE))
        self._at = _end(place)
        self.journal.add([key, *place])
        self.places[key] = place
        return place

    def begin_shard(self) -> None:
        """Starts the next file."""
        self._finish()
        self._number += 1
        self._begin(0)

    def _name(self) -> str:
        return f"{self.stem}-{self._number:05}.tar"

    def _begin(self, at: int) -> None:
        """Opens the shard and drops what follows its last complete member, which ends at `at`."""
        self._at = at
        with storage_errors(self.folder / self._name()):
            self._file = (self.folder / self._name()).open("ab")
            self._file.truncate(at)

    def _finish(self) -> None:
        with storage_errors(self.folder / self._name()):
            _write(self._file, END)
            self._file.close()


def present(folder: Path, rows: list[Any]) -> dict[str, Place]:
    """Places by key of a journal's rows, without members that are not fully on disk."""
    rows = [row for row in rows if _is_member(row)]
    sizes = {
        file: (folder / file).stat().st_size if (folder / file).is_file() else 0
        for file in {row[1] for row in rows}
    }
    return {key: place for key, *place in rows if _end(place) <= sizes[place[0]]}


def _is_member(row: Any) -> bool:
    """Whether a row, which may be damaged, has the form [key, file, offset, size, CRC-32]."""
    kinds = [type(x) for x in row] if isinstance(row, list) else []
    is_row = kinds == [str, str, int, int, int] and min(row[2:]) >= 0
    return is_row and re.fullmatch(r"\w+-\d+-\d{5,}\.tar", row[1]) is not None


def read_member(folder: Path, place: Place) -> bytes | None:
    """The bytes at a place; None where they are damaged."""
    file, at, size, crc = place
    try:
        with (folder / file).open("rb") as shard:
            shard.seek(at)
            payload = shard.read(size)
    except (OSError, ValueError):
        return None
    return payload if len(payload) == size and zlib.crc32(payload) == crc else None


def _end(place: Place) -> int:
    """The offset of the next member."""
    return -(-(place[1] + place[2]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _write(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
