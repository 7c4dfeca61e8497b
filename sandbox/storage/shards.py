"""Tensors by key in tar files that grow; what the journal names is whole, whatever ends a writer.

`STEM-00000.tar`, ... are shards as webdataset reads them, with a member KEY.safetensors for each
key; STEM.jsonl has a line for each: key, file, place of its bytes, their number and CRC-32. A
member is on the disk before its line is, so that a kill loses at most the one in work.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sandbox.storage.atomic import storing

if TYPE_CHECKING:
    from torch import Tensor

Place = list[Any]  # [file, offset, bytes, crc]
END = bytes(1024)  # of a tar file


class Journal:
    """Lines of JSON that are appended; one that a kill has torn is cut off at the next opening."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, [*read_journal(path)]
        with storing(path):
            self._file = path.open("ab")
            self._file.truncate(sum(len(_line(row)) for row in self.rows))

    def add(self, row: Any) -> None:
        """On the disk when it returns."""
        with storing(self.path):
            _write(self._file, _line(row))
        self.rows.append(row)

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> Iterator[Any]:
    """The rows of a journal up to the first that is not whole; none where there is no file."""
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
    """The one writer of the shards `stem` in `folder`; `places` are those of all keys so far.

    A shard takes members up to `shard_bytes`, and at least one.
    """

    def __init__(self, folder: Path, stem: str, shard_bytes: int) -> None:
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self.journal = Journal(folder / f"{stem}.jsonl")
        self.places = present(folder, self.journal.rows)
        numbers = [int(row[1].rpartition("-")[2][:-4]) for row in self.journal.rows]
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
        """Stores tensors under a key that is a file name; on the disk when it returns.

        Raises StorageError where it cannot be written.
        """
        from safetensors.torch import save

        return self.put(key, save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def put(self, key: str, payload: bytes) -> Place:
        """Stores the bytes of a member."""
        member = tarfile.TarInfo(f"{key}.safetensors")
        member.size = len(payload)
        head = member.tobuf(tarfile.USTAR_FORMAT)
        if self._at and self._at + len(head) + len(payload) > self.shard_bytes:
            self.begin_shard()
        place = [self._name(), self._at + len(head), len(payload), zlib.crc32(payload)]
        with storing(self.folder / self._name()):
            _write(self._file, head + payload + bytes(-len(payload) % tarfile.BLOCKSIZE))
        self._at = _end(place)
        self.journal.add([key, *place])
        self.places[key] = place
        return place

    def begin_shard(self) -> None:
        """What follows goes to another file."""
        self._finish()
        self._number += 1
        self._begin(0)

    def _name(self) -> str:
        return f"{self.stem}-{self._number:05}.tar"

    def _begin(self, at: int) -> None:
        """Goes on behind the last whole member of the shard."""
        self._at = at
        with storing(self.folder / self._name()):
            self._file = (self.folder / self._name()).open("ab")
            self._file.truncate(at)

    def _finish(self) -> None:
        with storing(self.folder / self._name()):
            _write(self._file, END)
            self._file.close()


def present(folder: Path, rows: list[Any]) -> dict[str, Place]:
    """Places by key of a journal's rows, of those that lie inside a file that is there."""
    sizes = {
        file: (folder / file).stat().st_size if (folder / file).is_file() else 0
        for file in {row[1] for row in rows}
    }
    return {key: place for key, *place in rows if _end(place) <= sizes[place[0]]}


def _end(place: Place) -> int:
    """Where the next member begins."""
    return -(-(place[1] + place[2]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _line(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _write(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
