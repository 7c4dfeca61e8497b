"""task=report: compares finished runs with confidence intervals, as a page and for a paper."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sandbox.config import registry
from sandbox.config.registry import register
from sandbox.contracts import ConfigError, StorageError, TaskConfig

if TYPE_CHECKING:
    from sandbox.reports.ablation import Ablation


@register("task", "report")
@dataclass
class Report:
    """Compares finished runs: intervals over seeds, differences to a baseline, costs, samples."""

    @dataclass
    class Config(TaskConfig):
        """runs: folder of a multirun, or a folder that contains run folders (null: out).

        baseline: a variant's letter, [C], or its settings, ["vae=pca","lr=1e-3"]; empty: the first.
        metrics: names to show; empty: all comparable ones. to: output folder (null: report/ in
        runs).

        send: also upload the page, tables and samples to W&B (logger=wandb).
        """

        needs_torch: ClassVar[bool] = False
        runs: str | None = None
        baseline: tuple[str, ...] = ()
        metrics: tuple[str, ...] = ()
        to: str | None = None
        send: bool = False

    cfg: Config

    def __call__(self, root: Any) -> dict[str, Any]:
        from sandbox.reports.ablation import compare
        from sandbox.reports.ablation_page import markdown_table, tables, write_ablation
        from sandbox.reports.ablation_runs import read

        folder = Path(self.cfg.runs or root.out)
        tracker = registry.create(root.logger) if self.cfg.send and root.logger else None
        if self.cfg.send and not hasattr(tracker, "page"):
            raise ConfigError("task.send=true: this logger does not accept pages; use logger=wandb")
        found = compare(read(folder), self.cfg.baseline, self.cfg.metrics)
        page = write_ablation(Path(self.cfg.to) if self.cfg.to else folder / "report", found)
        for heading, rows in tables(found):
            print(f"\n{heading}\n{markdown_table(rows)}")
        print("\n" + "\n".join(found.notes))
        print(f"page    {page}\ntables  {page.with_suffix('.md')}, {page.with_suffix('.tex')}")
        if tracker is not None:
            upload(tracker, page, found, folder.name)
        return {"folder": str(page.parent), "variants": len(found.variants)}


def upload(tracker: Any, page: Path, found: Ablation, group: str) -> None:
    """Uploads page, tables and images as a run of the same group (and sweep, if any).

    Raises StorageError; the local files are kept.
    """
    from sandbox.reports.ablation_page import plain, tables

    # further seeds of a trial have no sweep
    sweeps = {e.environment.get("sweep") for e in found.entries} - {None}
    sweep = sweeps.pop() if len(sweeps) == 1 else None
    try:
        tracker.start(page.parent, plain(found), "report", group, sweep)
        sheet = page.parent / "samples.png"
        if sheet.is_file():  # first: later calls close step 0
            tracker.images(0, "samples", [sheet])
        tracker.page("report", page)
        for heading, rows in tables(found):
            tracker.table(heading.partition(" ")[0].lower(), rows)
        tracker.finish(0)
    except Exception as e:  # third-party code and networks
        with suppress(Exception):
            tracker.finish(1)
        raise StorageError(
            f"the report was not uploaded ({type(e).__name__}: {e}); it is kept in "
            f"{page.parent}; run the same command again to retry"
        ) from e
