"""The report page of a run, `report.html`: self-contained, without scripts or network access.

A Content-Security-Policy allows inline styles and data URIs only. The layout is in
`templates/run.html.j2`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sandbox.reports.charts import Points, line_chart
from sandbox.reports.pages import Media, flatten, render
from sandbox.reports.scores import (
    ScoreRow,
    format_score,
    format_span,
    interval,
    names_of,
)
from sandbox.reports.tables import format_number
from sandbox.runs.run import Run
from sandbox.storage.atomic import storage_errors, write_atomic

LISTED = 200  # files and skipped items
SPLITS = ("train", "val", "test", "ema")  # metric prefixes that name a split or weights
EMA = "_ema"  # ending of metrics of EMA weights
TIMES = "val_times/"  # prefix of losses at fixed times
EN_DASH = "\N{EN DASH}"


@dataclass
class Report:
    """What a page shows. Everything but the title may be empty; then its section is left out."""

    title: str  # the recipe
    summary: str = ""  # one sentence on the system
    command: str = ""
    facts: dict[str, object] = field(default_factory=dict)  # top of the page: seed, steps, ...
    notes: list[str] = field(default_factory=list)
    scores: list[ScoreRow] = field(default_factory=list)
    meanings: dict[str, str] = field(default_factory=dict)  # of each score: chance and perfect
    rates: frozenset[str] = frozenset()  # scores that are shares of n clips
    samples: list[tuple[str, Path]] = field(default_factory=list)  # caption, video or image
    sheet: Path | None = None  # contact sheet or reconstruction sheet
    curves: dict[str, Points] = field(default_factory=dict)  # as `read_curves` returns them
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of the run
    settings: dict[str, Any] = field(default_factory=dict)  # resolved config, without secrets
    environment: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # data item -> reason


def write_report(folder: str | Path, report: Report) -> Path:
    """Writes report.html atomically into the run folder. Raises StorageError.

    Paths of samples and sheet are absolute, or relative to `folder` or the current directory.
    Missing files are named; files above 4 MiB, or above 16 MiB in total, are linked.
    """
    folder = Path(folder)
    media, charts = Media(folder), charts_of(report.curves)
    page = render(
        "run.html",
        report=report,
        scores=score_table(report),
        samples=[media.item(Path(path), caption) for caption, path in report.samples],
        sheet=media.item(Path(report.sheet), "contact sheet") if report.sheet else None,
        linear=[line_chart(name, series) for name, series in charts.items()],
        log=[line_chart(name, series, log_x=True) for name, series in charts.items()],
        by_time=time_chart(losses_by_time(report.curves)),
        total=sum(report.timings.values()),
        duration=duration,
        skipped=dict([*report.skipped.items()][:LISTED]),
        settings=dict(setting_tables(report.settings)),
        environment=flatten(report.environment),
        files=[*files_of(folder)][:LISTED],
    )
    path = folder / "report.html"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page)
    return path


def read_curves(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> [(step, value), ...] of a run folder; empty where it recorded none."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in Run(run).metrics().items():
        for name, value in row.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def score_table(report: Report) -> dict[str, Any]:
    """Tiles of the model's scores, and every row with bars; empty without scores."""
    rows = report.scores
    if not rows:
        return {}
    names = names_of(rows)

    def cell(row: ScoreRow, name: str) -> dict[str, Any]:
        bounds = interval(row, name) if name in report.rates else None
        value = row.values.get(name, math.nan)
        top = max(1.0, *(v for r in rows if math.isfinite(v := r.values.get(name, 0.0))))
        return {"value": format_score(value), "share": None if math.isnan(value) else value / top,
                "bounds": bounds, "span": format_span(bounds, EN_DASH)}  # fmt: skip

    tile_rows = math.ceil(len(names) / 5)
    return {
        "names": names,
        "across": math.ceil(len(names) / tile_rows),
        "rows": [(row, [cell(row, name) for name in names]) for row in rows],
        "rates": ", ".join(name for name in names if name in report.rates),
    }


def charts_of(curves: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Groups curves into charts: splits of one metric share a chart, and so do equal prefixes.

    "loss", "val/loss" -> chart "loss"; "score/colour", "score/digit" -> chart "score";
    "val_times/0.25_ema" -> chart "val_times_ema". Losses come first, the learning rate last.
    """
    charts: dict[str, dict[str, Points]] = {}
    for name, points in curves.items():
        head, _, tail = name.partition("/")
        chart, series = (tail, head) if tail and head in SPLITS else (head, tail or head)
        if chart == head and tail.endswith(EMA):
            chart, series = head + EMA, tail.removesuffix(EMA)
        if series == chart and any(f"{split}/{name}" in curves for split in SPLITS):
            series = "train"
        charts.setdefault(chart, {})[series] = points
    return dict(sorted(charts.items(), key=lambda c: c[0].startswith("lr") - ("loss" in c[0])))


def time_chart(series: dict[str, Points]) -> dict[str, Any] | None:
    """A chart over times whose heading shows means; None without series."""
    means = {name: math.fsum(v for _, v in points) / len(points) for name, points in series.items()}
    keys = [(name, format_number(mean)) for name, mean in means.items()]
    return line_chart("loss by time", series) | {"keys": keys} if series else None


def losses_by_time(curves: Mapping[str, Points]) -> dict[str, Points]:
    """The last losses at fixed times: weights -> [(time as a fraction of the schedule, loss)]."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, points in curves.items():
        time = name.removeprefix(TIMES).removesuffix(EMA)
        if name.startswith(TIMES) and time != "mean" and points:
            weights = "EMA" if name.endswith(EMA) else "live"
            found.setdefault(weights, []).append((float(time), points[-1][1]))
    return {weights: sorted(points) for weights, points in found.items()}


def duration(seconds: float) -> str:
    """0.12 s, 57 s, 1 min 52 s, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes < 60 else hours


def setting_tables(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Top-level settings, then each group: (heading, name on the command line -> value)."""
    groups = {k: v for k, v in settings.items() if isinstance(v, Mapping) and v}
    if plain := {k: v for k, v in settings.items() if k not in groups}:
        yield "run", plain
    for name, group in groups.items():
        plugin = str(group.get("plugin") or "").rpartition("/")[2]
        values = flatten(group, name)
        values.pop(f"{name}.plugin", None)
        yield f"{name}={plugin}" if plugin else name, values


def files_of(folder: Path) -> Iterator[tuple[str, str, int, bool]]:
    """(name, link, bytes or number of entries, is a folder) of the files in a run folder."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.name == "report.html":
            continue
        is_folder = path.is_dir()
        size = len([*path.iterdir()]) if is_folder else path.stat().st_size
        yield path.name + "/" * is_folder, quote(path.name) + "/" * is_folder, size, is_folder
