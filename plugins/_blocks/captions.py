"""Captions of the files of a folder, from tables and from text files next to them.

Per file the first of: a row of captions.csv; NAME.txt, NAME.caption, NAME.mp4.txt or
NAME.mp4.caption; a row of metadata.csv or metadata.jsonl.
"""

import csv
import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from plugins._blocks.folders import inside
from sandbox.contracts import BadItem, DataError

T = TypeVar("T")

TABLE = "captions.csv"
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file", "file_name", "file_path", "filename", "path", "video", "image")
TEXT_COLUMNS = ("caption", "text", "prompt")
ENDINGS = (".txt", ".caption")
LARGEST = 1 << 20  # bytes of one caption

log = logging.getLogger(__name__)


class Captions:
    """File name (relative to `root`) -> caption, "" if it has none; raises BadItem.

    Each of `folders` below the root has its own table; `table` replaces captions.csv of the root.
    """

    def __init__(self, root: Path, folders: Iterable[str] = (), table: Path | None = None) -> None:
        self.root = root
        self.rows: dict[str, str] = {}  # of captions.csv
        self.metadata: dict[str, str] = {}
        self.tables: set[str] = set()  # those that were read, relative to the root
        for folder in ("", *folders):
            path = table if table and not folder else root / folder / TABLE
            if path.is_file() or path == table:
                own = root / folder
                self.rows |= {folder + n: text for n, text in read_caption_table(path, own).items()}
                self.tables.add(folder + TABLE)
            for name in METADATA:
                if (found := read_metadata(root / folder / name)) is not None:
                    self.metadata |= {folder + file: text for file, text in found.items()}
                    self.tables.add(folder + name)

    def __call__(self, name: str) -> str:
        if text := self.rows.get(normalised_key(name)):
            return text
        return read_caption_file(self.root / name) or self.metadata.get(normalised_key(name), "")


def read_caption_table(path: Path, root: Path | None = None) -> dict[str, str]:
    """File name (relative to `root`, by default the table's folder) -> caption.

    Raises DataError if the table is broken or gives a file two captions.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, strict=True)
            columns = table.fieldnames or []
            file_column, text_column = (
                column_of(columns, FILE_COLUMNS),
                column_of(columns, TEXT_COLUMNS),
            )
            if file_column is None or text_column is None:
                raise DataError(f"{path}: want the columns file and caption, there are {columns}")
            captions: dict[str, str] = {}
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {table.line_num}: want {len(columns)} entries; quote commas"
                    )
                file, caption = (
                    relative_key(row[file_column], root or path.parent),
                    row[text_column],
                )
                caption = one_line(caption)
                if captions.setdefault(file, caption) != caption:
                    raise DataError(
                        f"{path}, line {table.line_num}: {file!r} has two captions; remove one"
                    )
            return captions
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a CSV in UTF-8") from e


def read_metadata(path: Path) -> dict[str, str] | None:
    """As `read_caption_table`, of a table that other programs write; None if it has no captions."""
    if not path.is_file():
        return None
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            columns = csv.DictReader(lines).fieldnames or []
        if None in (column_of(columns, FILE_COLUMNS), column_of(columns, TEXT_COLUMNS)):
            return None  # a table of another format, such as WebVid's
    try:
        return read_caption_table(path) if path.suffix == ".csv" else dict(json_lines(path))
    except (DataError, OSError, ValueError, RecursionError) as e:
        log.warning("%s is not used: %s", path, e)
        return None


def json_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Raises OSError and ValueError."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            row: Any = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: want an object with file_name and text")
            keys = column_of(row, FILE_COLUMNS), column_of(row, TEXT_COLUMNS)
            file, text = (row.get(key) for key in keys)
            if isinstance(file, str) and isinstance(text, str):
                yield relative_key(file, path.parent), one_line(text)


def column_of(columns: Iterable[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if name in columns), None)
    """The `normalised_key` of a name in a table, relative to `root` if the file is below it."""


def relative_key(file: str, root: Path) -> str:
    """The `normalised_key` of a name in a table, relative to `root` if the file is below it."""
    file = file.strip()
    file = file.replace("\\", "/") if "/" not in file else file  # of Windows
    return normalised_key(inside(root, file) or PurePosixPath(file).as_posix())


def normalised_key(name: str) -> str:
    """`name` with accents as one character; file systems and tables differ in them."""
    return unicodedata.normalize("NFC", name)


def caption_files(media: Path) -> list[Path]:
    """Where the caption of a file may be."""
    stems = (media.with_suffix(""), media)
    return [stem.with_name(stem.name + ending) for stem in stems for ending in ENDINGS]


def read_caption_file(media: Path) -> str:
    """The text of the first caption file of `media` with one; "" if none has. Raises BadItem."""
    for path in caption_files(media):
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise BadItem(f"its caption {path.name} has more than {LARGEST} bytes")
            text = one_line(content.decode("utf-8-sig"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as e:
            raise BadItem(f"its caption {path.name} cannot be read: {e}") from e
        if text:
            return text
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
