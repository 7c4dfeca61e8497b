"""Captions from .txt files, a table or a template.

All clips of a file get the file's caption. A captioning model can be a stage of its own that
returns {"caption": ...}.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from plugins._blocks.captions import read_caption_file, read_caption_table
from sandbox.contracts import DataError, Row, StageConfig, one_of
from sandbox.registry import register

MISSING = ("empty", "drop", "template")
FIELDS = ("name", "folder", "width", "height", "seconds")


@register("stage", "captions")
class Captions:
    """Captions clips from a .txt file of the same name, or a table."""

    @dataclass
    class Config(StageConfig):
        """table: a CSV with the columns file and caption; null: captions.csv of the folder, if any.

        missing: caption of clips without one: "empty", "drop" (drops the clip) or "template", which
        can use {name} (of the file, with spaces for "_" and "-"), {folder}, {width}, {height} and
        {seconds}.
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
                yield f"template={self.template!r}: {e!r}; want text with fields of {list(FIELDS)}"

        def files(self) -> dict[str, str | None]:
            return {} if self.table is None else {"table": self.table}

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def judge(self, rows: list[Row]) -> list[dict[str, Any]]:
        tables: dict[Path, dict[str, str]] = {}
        return [self._caption(row, tables) for row in rows]

    def _caption(self, row: Row, tables: dict[Path, dict[str, str]]) -> dict[str, Any]:
        """The fields to set in `row`; `tables` caches the tables that were read."""
        if row.get("caption"):
            return {}
        path = Path(row["path"])
        root = path.parents[len(PurePosixPath(row["source"]).parts) - 1]
        table = Path(self.cfg.table).expanduser() if self.cfg.table else root / "captions.csv"
        if table not in tables:
            exists = self.cfg.table or table.is_file()
            tables[table] = read_caption_table(table) if exists else {}
        try:
            text = tables[table].get(row["source"]) or read_caption_file(path)
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path.with_suffix('.txt')} cannot be read: {e}") from e
        if not text and self.cfg.missing == "drop":
            return {"drop": "has no caption"}
        if not text and self.cfg.missing == "template":
            text = self._from_template(row)
        return {"caption": text}

    def _from_template(self, row: Row) -> str:
        # caption lists are UTF-8, file names need not be
        source = PurePosixPath(row["source"].encode("utf-8", "replace").decode())
        info = row["info"]
        return self.cfg.template.format(
            name=" ".join(source.stem.replace("_", " ").replace("-", " ").split()),
            folder=source.parent.name, width=info.width, height=info.height,
            seconds=f"{row['end'] - row['start']:.1f}",
        )  # fmt: skip
