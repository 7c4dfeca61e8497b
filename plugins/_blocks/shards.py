"""Tensors that task=encode has stored, from their place in a tar file."""

import json
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from sandbox.contracts import BadItem, DataError

INDEX, FORMAT = "index.json", 1


def read_index(folder: Path) -> dict[str, Any]:
    """What task=encode says of the folder. Raises DataError."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(
            f"data.root={folder}: it has no {INDEX} that can be read ({e}); task=encode "
            "task.to=FOLDER writes it when all clips are stored"
        ) from e
    if index["format"] != FORMAT:
        raise DataError(
            f"data.root={folder}: its format is {index['format']}, want {FORMAT}; encode it again"
        )
    return index


def read_tensors(folder: Path, place: list[Any]) -> dict[str, Tensor]:
    """The tensors at [file, offset, bytes, CRC-32]. Raises BadItem where they are damaged."""
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
        raise BadItem(f"{name} is damaged at byte {offset}: run task=encode on a new folder")
    try:
        return load(payload)
    except SafetensorError as e:
        raise BadItem(f"{name} is damaged at byte {offset}: {e}") from e
