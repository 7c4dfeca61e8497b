"""Splits clips into training and validation by source: all clips of a source are in one split."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from plugins._blocks.folders import held_out
from sandbox.contracts import Row, StageConfig, above, one_of
from sandbox.registry import register

SOURCES = ("file", "folder")


@register("stage", "split")
class Split:
    """Holds out clips for validation, keeping the clips of a source together."""

    @dataclass
    class Config(StageConfig):
        """fraction: fraction of the sources, chosen by hash: adding sources does not move others.

        source: "file" (identical files are one source) or "folder" (the files of a folder are one
        source). With two or more sources, each split gets at least one.
        """

        fraction: float = 0.05
        source: str = "file"

        limits: ClassVar[tuple[str, ...]] = ("fraction", "source")

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("fraction", self.fraction, 0, 0.9)
            yield from one_of("source", self.source, SOURCES)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def judge(self, rows: list[Row]) -> list[dict[str, Any]]:
        sources = [self._source(row) for row in rows]
        held = held_out(set(sources), self.cfg.fraction)
        return [{"split": "val" if source in held else "train"} for source in sources]

    def _source(self, row: Row) -> str:
        if self.cfg.source == "folder":
            return PurePosixPath(row["source"]).parent.as_posix()
        return row["info"].sha256
