"""Captions of files: tables with the columns file and caption, and .txt files of the same name."""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sandbox.contracts import BadItem, DataError

T = TypeVar("T")


def read_caption_table(path: Path) -> dict[str, str]:
    """File name (relative to the table's folder) -> caption.

    Raises DataError if the table is broken or gives a file two captions.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, strict=True)
            columns = table.fieldnames or []
            if not {"file", "caption"} <= set(columns):
                raise DataError(f"{path}: want the columns file and caption, there are {columns}")
            captions: dict[str, str] = {}
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {table.line_num}: want {len(columns)} entries; quote commas"
                    )
                file = PurePosixPath(row["file"].strip()).as_posix()
                caption = one_line(row["caption"])
                if captions.setdefault(file, caption) != caption:
                    raise DataError(
                        f"{path}, line {table.line_num}: {file!r} has two captions; remove one"
                    )
            return captions
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a CSV in UTF-8") from e


def read_caption_file(media: Path) -> str:
    """The text of the .txt file with the name of `media`; "" if there is none.

    Raises OSError or UnicodeDecodeError.
    """
    try:
        return one_line(media.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return ""


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_captions(rows: Iterable[T], caption_of: Callable[[T], str], count: int) -> list[str]:
    """The first `count` captions; skips rows whose `caption_of` raises BadItem."""
    captions: list[str] = []
    for row in rows:
        if len(captions) == count:
            break
        try:
            captions.append(caption_of(row))
        except BadItem:
            continue  # the loader counts it
    return captions
