"""Reads tensors cached by task=encode from their offsets in tar files."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.contracts import BadItem, DataError

INDEX, FORMAT = "index.json", 1


def read_index(folder: Path) -> dict[str, Any]:
    """The index that task=encode writes. Raises DataError."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version, digest = index["format"], index.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(
            f"data.root={folder}: no readable {INDEX} ({e!r}); task=encode task.to=FOLDER writes "
            "it once all clips are encoded"
        ) from e
    if version != FORMAT:
        raise DataError(
            f"data.root={folder}: its format is {version}, want {FORMAT}; run task=encode again"
        )
    if digest not in (None, hashlib.sha256(json.dumps(index).encode()).hexdigest()):
        raise DataError(f"data.root={folder}: its {INDEX} is damaged; run task=encode again")
    return index


def read_tensors(folder: Path, place: list[Any]) -> dict[str, Tensor]:
    """The tensors at `place` = [file, offset, bytes, CRC-32]. Raises BadItem."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    name, offset, size, crc = place
    try:
        with (folder / name).open("rb") as file:
            file.seek(offset)
            payload = file.read(size)
    except OSError as e:
        raise BadItem(f"{name} cannot be read: {e}") from e
    if len(payload) != size or zlib.crc32(payload) != crc:
        raise BadItem(f"{name} is damaged at byte {offset}: run task=encode again")
    try:
        return load(payload)
    except SafetensorError as e:
        raise BadItem(f"{name} is damaged at byte {offset}: {e}") from e
