"""Captions from files of the same name, a table or a template.

All clips of a file get the file's caption. A captioning model can be a separate stage that
returns {"caption": ...}.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from plugins._blocks.captions import Captions as FolderCaptions
from sandbox.contracts import BadItem, DataError, Row, StageConfig, one_of
from sandbox.registry import register

MISSING = ("empty", "drop", "template")
FIELDS = ("name", "folder", "width", "height", "seconds")


@register("stage", "captions")
class Captions:
    """Captions clips from a .txt file of the same name, or a table."""

    @dataclass
    class Config(StageConfig):
        """table: a CSV with the columns file and caption; null: captions.csv of the folder, if any.
        Else captions are read as by data=video_folder.

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

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        folders: dict[Path, FolderCaptions] = {}
        return [self._caption(row, folders) for row in rows]

    def _caption(self, row: Row, folders: dict[Path, FolderCaptions]) -> dict[str, Any]:
        """The fields to set in `row`; `folders` caches the tables that were read."""
        if row.get("caption"):
            return {}
        path = Path(row["path"])
        root = path.parents[len(PurePosixPath(row["source"]).parts) - 1]
        if root not in folders:
            table = Path(self.cfg.table).expanduser() if self.cfg.table else None
            folders[root] = FolderCaptions(root, table=table)
        try:
            text = folders[root](row["source"])
        except BadItem as e:
            raise DataError(f"{path}: {e}") from e
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
