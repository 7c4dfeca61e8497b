"""metrics.csv in the run folder."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.contracts import PluginConfig
from sandbox.registry import register


@register("logger", "csv")
class CSVLogger:
    """Writes metrics.csv to the run folder: one row per step, one column per metric."""

    @dataclass
    class Config(PluginConfig):
        pass

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.columns: list[str] = ["step"]

    def start(self, folder: Path, config: dict[str, Any], name: str, group: str | None) -> None:
        self.path = folder / "metrics.csv"
        if self.path.is_file():
            self._write(self._rows())

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        new = [k for k in metrics if k not in self.columns]
        if new or not self.path.is_file():
            rows = self._rows() if self.path.is_file() else {}
            self.columns += new
            self._write(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **metrics})

    def video(self, step: int, name: str, path: Path, caption: str = "") -> None:
        """Nothing to do: the file is in the run folder."""

    def images(
        self, step: int, name: str, paths: Sequence[Path], captions: Sequence[str] = ()
    ) -> None:
        """Nothing to do: the files are in the run folder."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing to do: the values are in result.json."""

    def finish(self, exit_code: int) -> None:
        if self.path.is_file():
            self._write(self._rows())

    def _rows(self) -> dict[int, dict[str, str]]:
        """Step -> cells of the file; for a repeated step the last value of each column."""
        found: dict[int, dict[str, str]] = {}
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            self.columns += [k for k in reader.fieldnames or [] if k not in self.columns]
            for row in reader:
                if row["step"].isdigit():
                    found.setdefault(int(row["step"]), {}).update(
                        {k: v for k, v in row.items() if k and v}
                    )
        return dict(sorted(found.items()))

    def _write(self, rows: dict[int, dict[str, str]]) -> None:
        part = self.path.with_name(".metrics.csv.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows.values())
        os.replace(part, self.path)
