"""task=report: finished runs as one comparison with intervals, for a screen and for a paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.contracts import TaskConfig
from sandbox.registry import register


@register("task", "report")
class Report:
    """Compares finished runs: intervals over seeds, differences to a baseline, costs, samples."""

    @dataclass
    class Config(TaskConfig):
        """runs: folder of a multirun, or one that holds run folders (null: out). baseline: settings
        that choose one variant, such as [backbone=dit,lr=1e-3]; none: the first. metrics: numbers
        to show; none: all that can be compared. to: folder for the files; null is report/ in runs.

        send: also send the page, tables and samples to W&B, beside the runs (logger=wandb).
        """

        needs_torch: ClassVar[bool] = False
        runs: str | None = None
        baseline: tuple[str, ...] = ()
        metrics: tuple[str, ...] = ()
        to: str | None = None
        send: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for word in self.baseline:
                if "=" not in word:
                    yield f"baseline={word!r}: want settings, such as [backbone=dit,lr=1e-3]"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, root: Any) -> dict[str, Any]:
        from pathlib import Path

        from sandbox.ablation import compare, read
        from sandbox.ablation_page import markdown_table, tables, write_ablation

        folder = Path(self.cfg.runs or root.out)
        found = compare(read(folder), self.cfg.baseline, self.cfg.metrics)
        page = write_ablation(Path(self.cfg.to) if self.cfg.to else folder / "report", found)
        for heading, rows in tables(found):
            print(f"\n{heading}\n{markdown_table(rows)}")
        print("\n" + "\n".join(found.notes))
        print(f"page    {page}\ntables  {page.with_suffix('.md')}, {page.with_suffix('.tex')}")
        return {"folder": str(page.parent), "variants": len(found.variants)}
