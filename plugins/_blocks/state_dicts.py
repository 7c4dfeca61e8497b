"""Weight files of plugins: read, compared and checked as those of the program."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sandbox.storage import weight_files
from sandbox.storage.weight_check import check_values, differences, is_checking_weight_files
from sandbox.storage.weight_check import kind_of as what_weights
from sandbox.storage.weight_contents import plain_name, plain_names
from sandbox.storage.weight_files import log_once, named

__all__ = [
    "check_values",
    "differences",
    "is_checking_weight_files",
    "log_once",
    "named",
    "plain_name",
    "plain_names",
    "read_file",
    "read_header",
    "what_weights",
]


def read_file(path: Path, setting: str, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors by name of a weight file, without executing code.

    `mapped`: memory-maps them. Raises StorageError, which names `setting` and what the file is.
    """
    with named(setting):
        return weight_files.read(path, mapped)


def read_header(path: Path, setting: str) -> dict[str, str]:
    """The texts in the header of a safetensors file; empty for other files."""
    with named(setting):
        return weight_files.header(path)
