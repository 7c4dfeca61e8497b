"""Training and validation, by source: no clip of one source is on both sides."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

from sandbox.contracts import Row, StageConfig, above, one_of
from sandbox.registry import register

SOURCES = ("file", "folder")


@register("stage", "split")
class Split:
    """Holds clips out for validation, all of a source together."""

    @dataclass
    class Config(StageConfig):
        """fraction: of the sources, by a hash: other sources do not change a source's side.

        source: "file" (files of the same bytes are one), or "folder" where the files of a folder
        belong together. Of two or more sources at least one is on each side.
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

    def decide(self, rows: list[Row]) -> list[dict[str, Any]]:
        sources = [self._source(row) for row in rows]
        held = held_out({*sources}, self.cfg.fraction)
        return [{"split": "val" if source in held else "train"} for source in sources]

    def _source(self, row: Row) -> str:
        if self.cfg.source == "folder":
            return PurePosixPath(row["source"]).parent.as_posix()
        return row["info"].sha256


def held_out(sources: set[str], fraction: float) -> set[str]:
    if len(sources) < 2:
        return set()
    places = {s: hashlib.blake2b(s.encode(), digest_size=8).digest() for s in sources}
    ordered = sorted(sources, key=lambda s: places[s])
    count = sum(int.from_bytes(p) < fraction * 2**64 for p in places.values())
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])
