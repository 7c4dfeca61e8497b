"""Captions from files beside the videos, from a table, or from a template.

A caption belongs to a file by its name; each clip of a file has it. A model that looks at clips is
a stage of its own, which says {"caption": ...}.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from sandbox.contracts import DataError, Row, StageConfig, one_of
from sandbox.registry import register

MISSING = ("empty", "drop", "template")
FIELDS = ("name", "folder", "width", "height", "seconds")


@register("stage", "captions")
class Captions:
    """Gives clips the captions of their files: a .txt of the same name, or a table."""

    @dataclass
    class Config(StageConfig):
        """table: a CSV with the columns file and caption; null: captions.csv of the folder, if any.

        missing: what becomes of a clip without one: "empty", "drop", or "template", which may name
        {name} (of the file, its "_" and "-" made spaces), {folder}, {width}, {height}, {seconds}.
        """

        table: str | None = None
        missing: str = "empty"
        template: str = "{name}"

        limits: ClassVar[tuple[str, ...]] = ("table", "missing", "template")

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("missing", self.missing, MISSING)
            try:
                self.template.format(**dict.fromkeys(FIELDS, 0))
            except (KeyError, ValueError, IndexError) as e:
                yield f"template={self.template!r}: {e!r}; want a text with some of {list(FIELDS)}"

        def files(self) -> dict[str, str | None]:
            return {} if self.table is None else {"table": self.table}

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        tables: dict[Path, dict[str, str]] = {}
        return [self._say(row, tables) for row in rows]

    def _say(self, row: Row, tables: dict[Path, dict[str, str]]) -> dict[str, Any]:
        if row.get("caption"):
            return {}
        root = Path(row["path"]).parents[len(PurePosixPath(row["source"]).parts) - 1]
        table = Path(self.cfg.table).expanduser() if self.cfg.table else root / "captions.csv"
        if table not in tables:
            tables[table] = read_table(table) if self.cfg.table or table.is_file() else {}
        text = tables[table].get(row["source"]) or beside(Path(row["path"]))
        if not text and self.cfg.missing == "drop":
            return {"drop": "has no caption"}
        if not text and self.cfg.missing == "template":
            text = self._templated(row)
        return {"caption": text}

    def _templated(self, row: Row) -> str:
        # a name that is no UTF-8 cannot be written to a list of captions
        source = PurePosixPath(row["source"].encode("utf-8", "replace").decode())
        info = row["info"]
        return self.cfg.template.format(
            name=" ".join(source.stem.replace("_", " ").replace("-", " ").split()),
            folder=source.parent.name, width=info.width, height=info.height,
            seconds=f"{row['end'] - row['start']:.1f}",
        )  # fmt: skip


def beside(path: Path) -> str:
    """The text of the .txt file of the same name, in one line; "" without one."""
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path.with_suffix('.txt')} cannot be read: {e}") from e


def read_table(path: Path) -> dict[str, str]:
    """File -> caption. Raises DataError for a broken table, and for a file with two captions."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table, found = csv.DictReader(lines, strict=True), {}
            if not {"file", "caption"} <= set(table.fieldnames or ()):
                raise DataError(f"{path}: want columns file and caption, has {table.fieldnames}")
            for row in table:
                if None in row or None in row.values():
                    raise DataError(f"{path}, line {table.line_num}: too few or too many entries")
                name = PurePosixPath(row["file"].strip()).as_posix()
                text = " ".join(row["caption"].split())
                if found.setdefault(name, text) != text:
                    raise DataError(f"{path}, line {table.line_num}: {name!r} has two captions")
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a CSV in UTF-8") from e
