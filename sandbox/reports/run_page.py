"""One self-contained page about a run, and the same scores for a terminal.

The page needs no network and no scripts: pictures and videos are inside it, a
Content-Security-Policy forbids everything else, and all text is escaped (`sandbox.reports.markup`).
Looks are in `run_page.html`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from sandbox.reports.charts import Points, line_chart
from sandbox.reports.markup import Markup, el, join
from sandbox.reports.scores import (
    ScoreRow,
    interval,
    names_of,
    rates_of,
    span,
    terminal_table,
    written,
)
from sandbox.storage.atomic import storing, write_atomic

__all__ = [
    "Report",
    "ScoreRow",
    "charts_of",
    "duration",
    "read_curves",
    "terminal_table",
    "write_report",
]

FILE_LIMIT = 4 * 2**20  # bytes of one picture or video that goes into the page
PAGE_LIMIT = 16 * 2**20  # bytes of all of them
LISTED = 200  # files and skipped items
CHARS = 300  # of one setting
MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg",
         ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}  # fmt: skip
SPLITS = (
    "train",
    "val",
    "test",
    "ema",
)  # prefixes of a metric that name who was measured, not what
EN_DASH = "\N{EN DASH}"
TEMPLATE = Path(__file__).with_name("run_page.html")


@dataclass
class Report:
    """What a page shows. Everything but the title may be empty; then its section is left out."""

    title: str  # the recipe
    summary: str = ""  # what was trained, in a sentence
    command: str = ""
    facts: dict[str, object] = field(default_factory=dict)  # top of the page: seed, steps, ...
    notes: list[str] = field(default_factory=list)  # what a reader must know first
    scores: list[ScoreRow] = field(default_factory=list)
    meanings: dict[str, str] = field(default_factory=dict)  # of each score: chance and perfect
    rates: frozenset[str] | None = None  # scores that are shares of n clips; None: that can be
    samples: list[tuple[str, Path]] = field(default_factory=list)  # caption, mp4 or picture
    sheet: Path | None = None  # contact sheet or reconstruction sheet
    curves: dict[str, Points] = field(default_factory=dict)  # as `read_curves` gives them
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of the run
    settings: dict[str, Any] = field(default_factory=dict)  # resolved config, without secrets
    environment: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # data item -> reason


def write_report(folder: str | Path, report: Report) -> Path:
    """Writes report.html into the run folder, whole or not at all. Raises StorageError.

    Paths of samples and sheet are absolute, or relative to `folder` or the working directory.
    Files that are missing, or too large for the page (4 MiB each, 16 MiB together), are named and
    linked instead.
    """
    folder = Path(folder)
    media = Media(folder)
    sections = join(
        _notes(report.notes),
        _scores(report),
        _samples(report.samples, media),
        _sheet(report.sheet, media),
        _curves(report.curves),
        _timings(report.timings),
        _skipped(report.skipped),
        _settings(report.settings),
        _environment(report.environment),
        _files(folder),
    )
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=join(report.title, " - run report"), header=_header(report), sections=sections
    )
    path = folder / "report.html"
    with storing(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page)
    return path


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl, one {"step": 3, "loss": 0.9, ...} a line -> by name (step, value), in order.

    Where a step was written twice (a resumed run) the later line counts. A line that a kill has
    cut short is passed over, and so is what is not a number. No file: no curves.
    """
    path = Path(path)
    found: dict[str, dict[int, float]] = {}
    if not path.exists():
        return {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[entry["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


# --- scores ---------------------------------------------------------------------------------------


def _scores(report: Report) -> Markup:
    """The model's scores large and explained, then every row with bars."""
    rows = report.scores
    if not rows:
        return Markup()
    rates = rates_of(rows) if report.rates is None else report.rates
    names = names_of(rows)
    tiles = [_tile(rows[0], name, name in rates, report.meanings.get(name, "")) for name in names]
    across = len(tiles) if len(tiles) <= 5 else math.ceil(len(tiles) / math.ceil(len(tiles) / 5))
    heads = [el("th", name, class_="num") for name in [*names, "n"]]
    body = []
    for row in rows:
        cells = [_cell(rows, row, name, name in rates) for name in names]
        count = el("td", f"{row.n:,}", class_="num n")
        mark = "model" if row is rows[0] else None
        body.append(el("tr", el("th", row.name), *cells, count, class_=mark))
    head = el("thead", el("tr", el("th", "clips"), *heads))
    table = el("table", head, el("tbody", *body), class_="scores")
    legend = "Bars run from 0 to 1, or to the largest value of a column that goes beyond 1. "
    if rates:
        shares = ", ".join(name for name in names if name in rates)
        legend += f"Whiskers and ranges are 95 % Wilson intervals ({shares})."
    return section(
        "Scores",
        el("div", *tiles, class_="tiles", style=f"--across:{across}"),
        el("div", table, class_="scroll"),
        el("p", legend, class_="quiet small"),
    )


def _tile(model: ScoreRow, name: str, is_rate: bool, meaning: str) -> Markup:
    bounds = interval(model, name) if is_rate else None
    return el(
        "div",
        el("h3", name),
        el("p", written(model.values.get(name)), class_="figure"),
        el("p", f"95 %: {span(bounds, EN_DASH)}" if bounds else "", class_="span"),
        el("p", meaning, class_="meaning"),
        class_="tile",
    )


def _cell(rows: Sequence[ScoreRow], row: ScoreRow, name: str, is_rate: bool) -> Markup:
    """A number over a bar, with a whisker where it is a rate."""
    value = row.values.get(name, math.nan)
    if math.isnan(value):
        return el("td", EN_DASH, class_="num")
    top = max(1.0, *(v for r in rows if math.isfinite(v := r.values.get(name, 0.0))))
    bar = [el("i", class_="bar", style=f"width:{_percent(value / top)}")]
    bounds = interval(row, name) if is_rate else None
    if bounds:
        style = f"left:{_percent(bounds[0])};width:{_percent(bounds[1] - bounds[0])}"
        bar.append(el("i", class_="whisker", style=style))
    title = f"{row.name}: {span(bounds, EN_DASH)}" if bounds else None
    return el("td", written(value), el("span", *bar, class_="track"), class_="num", title=title)


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


# --- pictures -------------------------------------------------------------------------------------


class Media:
    """Files of a run as data URIs, as long as the page has room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.room = PAGE_LIMIT

    def show(self, path: Path, caption: str) -> Markup:
        """`<video>` or `<img>`, or a line that says why it is not in the page, with a link."""
        file = self.find(path)
        kind = MEDIA.get(file.suffix.lower())
        if not file.is_file():
            return el("p", f"{path.name}: no such file", class_="absent")
        size = file.stat().st_size
        if kind is None or size > min(FILE_LIMIT, self.room):
            why = "not a picture or video" if kind is None else "too large for this page"
            return el("p", self.link(file), f" ({_bytes(size)}) is {why}", class_="absent")
        self.room -= size
        source = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
        if kind.startswith("video/"):
            flags = {"autoplay": True, "loop": True, "muted": True, "playsinline": True}
            return el("video", src=source, aria_label=caption, **flags)
        return el("img", src=source, alt=caption)

    def find(self, path: Path) -> Path:
        """Relative paths start at the run folder, or else at the working directory."""
        inside = self.folder / path
        return path if path.is_file() and not inside.is_file() else inside

    def link(self, file: Path) -> Markup:
        """A relative link where the file lies in the run folder, else its name."""
        try:
            inside = file.resolve().relative_to(self.folder.resolve()).as_posix()
        except ValueError:
            return join(file.name)
        return el("a", inside, href=quote(inside))


def _samples(samples: Sequence[tuple[str, Path]], media: Media) -> Markup:
    figures = [
        el("figure", media.show(Path(path), caption), el("figcaption", caption, title=caption))
        for caption, path in samples
    ]
    return section("Samples", el("div", *figures, class_="samples")) if figures else Markup()


def _sheet(sheet: Path | None, media: Media) -> Markup:
    if sheet is None:
        return Markup()
    shown = media.show(Path(sheet), "contact sheet")
    where = el("p", "Full size: ", media.link(media.find(Path(sheet))), class_="quiet small")
    return section("Beside real clips", el("figure", shown, class_="sheet"), where)


# --- curves and times -----------------------------------------------------------------------------


def charts_of(curves: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Which curves share a chart: those that differ in train, val, test or ema, or share a prefix.

    "loss", "val/loss" -> chart "loss"; "score/colour", "score/digit" -> chart "score". Losses come
    first, the learning rate last.
    """
    charts: dict[str, dict[str, Points]] = {}
    for name, points in curves.items():
        head, _, tail = name.partition("/")
        chart, series = (tail, head) if tail and head in SPLITS else (head, tail or head)
        if series == chart and any(n in curves for n in (f"{split}/{name}" for split in SPLITS)):
            series = "train"
        charts.setdefault(chart, {})[series] = points
    order = {name: (name.startswith("lr") - ("loss" in name), i) for i, name in enumerate(charts)}
    return dict(sorted(charts.items(), key=lambda item: order[item[0]]))


def _curves(curves: Mapping[str, Points]) -> Markup:
    """Every chart twice, with linear and logarithmic steps; radio buttons choose, not a script."""
    charts = charts_of(curves)
    if not charts:
        return Markup()
    linear = [line_chart(name, series) for name, series in charts.items()]
    log = [line_chart(name, series, log_x=True) for name, series in charts.items()]
    return section(
        "Training",
        el("input", type="radio", name="steps", id="steps-linear", checked=True),
        el("label", "steps", for_="steps-linear"),
        el("input", type="radio", name="steps", id="steps-log"),
        el("label", "log steps", for_="steps-log"),
        el("div", *linear, class_="charts linear"),
        el("div", *log, class_="charts log"),
        el("p", "Faint: as measured. Strong: smoothed; its last value is in the heading.",
           class_="quiet small"),
    )  # fmt: skip


def _timings(timings: Mapping[str, float]) -> Markup:
    total = sum(timings.values())
    if not total > 0:
        return Markup()
    parts, keys = [], []
    for i, (name, seconds) in enumerate(timings.items()):
        colour = f"background:var(--c{i % 6})"
        parts.append(el("i", style=f"width:{_percent(seconds / total)};{colour}"))
        key = el(
            "span", el("i", class_="swatch", style=colour), f"{name} ", el("b", duration(seconds))
        )
        keys.append(el("li", key))
    heading = f"Where the time went: {duration(total)}"
    return section(heading, el("div", *parts, class_="stack"), el("ul", *keys, class_="keys"))


def duration(seconds: float) -> str:
    """0.12 s, 57 s, 1 min 52 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


# --- words ----------------------------------------------------------------------------------------


def section(heading: str, *content: object) -> Markup:
    return el("section", el("h2", heading), *content)


def _header(report: Report) -> Markup:
    facts = [
        el("div", el("dt", name), el("dd", _setting(value))) for name, value in report.facts.items()
    ]
    return el(
        "header",
        el("p", "Run report", class_="eyebrow"),
        el("h1", report.title),
        el("p", report.summary, class_="summary") if report.summary else "",
        el("pre", el("code", report.command), class_="command") if report.command else "",
        el("dl", *facts, class_="facts") if facts else "",
    )


def _notes(notes: Sequence[str]) -> Markup:
    return el("ul", *(el("li", note) for note in notes), class_="notes") if notes else Markup()


def _skipped(skipped: Mapping[str, str]) -> Markup:
    if not skipped:
        return Markup()
    rows = pairs(dict(list(skipped.items())[:LISTED]))
    more = f"and {len(skipped) - LISTED:,} more" if len(skipped) > LISTED else ""
    summary = f"{len(skipped):,} data items were skipped"
    return folded(summary, rows, el("p", more, class_="quiet"), open=len(skipped) <= 10)


def _settings(settings: Mapping[str, Any]) -> Markup:
    """Top-level settings, then a table for each group, named as on the command line."""
    if not settings:
        return Markup()
    groups = {k: v for k, v in settings.items() if isinstance(v, Mapping) and v}
    plain = {k: v for k, v in settings.items() if k not in groups}
    tables = [el("div", el("h3", "run"), pairs(plain))] if plain else []
    for name, group in groups.items():
        plugin = str(group.get("plugin") or "")
        heading = f"{name}={plugin.rpartition('/')[2]}" if plugin else name
        leaves = dict(_leaves(group, name))
        leaves.pop(f"{name}.plugin", None)
        tables.append(el("div", el("h3", heading), pairs(leaves)))
    return folded("Every setting", el("div", *tables, class_="groups"))


def _leaves(node: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}", value


def _environment(environment: Mapping[str, Any]) -> Markup:
    if not environment:
        return Markup()
    flat = {name.partition(".")[2]: value for name, value in _leaves(environment, "")}
    return folded("Environment", pairs(flat))


def _files(folder: Path) -> Markup:
    """Links to what lies in the run folder; folders with many files count them."""
    listed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.name == "report.html":
            continue
        link = el("a", path.name + "/" * path.is_dir(), href=quote(path.name) + "/" * path.is_dir())
        inside = sum(1 for _ in path.iterdir()) if path.is_dir() else 0
        size = f"{inside} files" if path.is_dir() else _bytes(path.stat().st_size)
        listed.append(el("li", link, " ", el("span", size, class_="quiet")))
    if not listed:
        return Markup()
    return section("Files of this run", el("ul", *listed[:LISTED], class_="files"))


def folded(summary: str, *content: object, open: bool = False) -> Markup:
    return el("details", el("summary", summary), *content, open=open)


def pairs(values: Mapping[str, Any]) -> Markup:
    rows = [el("tr", el("th", name), el("td", _setting(value))) for name, value in values.items()]
    return el("table", el("tbody", *rows), class_="pairs")


def _setting(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
    return shown if len(shown) <= CHARS else shown[: CHARS - 3] + "..."


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
