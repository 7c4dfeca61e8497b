"""One self-contained page about a run, and the same scores for a terminal.

The page needs no network and no scripts: pictures and videos are inside it, a Content-Security-Policy forbids
everything else, and all text is escaped (`sandbox.markup`). Looks are in `report_template.html`.
"""

from __future__ import annotations

import base64
import json
import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from sandbox.charts import Points, line_chart, number
from sandbox.files import storing, write_atomic
from sandbox.markup import Markup, el, join

FILE_LIMIT = 4 * 2**20  # bytes of one picture or video that goes into the page
PAGE_LIMIT = 16 * 2**20  # bytes of all of them
LISTED = 200  # files and skipped items
CHARS = 300  # of one setting
MEDIA = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".jpg": "image/jpeg",
         ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}  # fmt: skip
SPLITS = ("train", "val", "test", "ema")  # prefixes of a metric that name who was measured, not what
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass
class ScoreRow:
    """Scores of one kind of clips. The first row of a report is the model; the others are for comparison."""

    name: str  # "this model", "real clips", "first-stage ceiling", "mean clip", "untrained model"
    values: dict[str, float]
    n: int  # clips that were judged


@dataclass
class Report:
    """What a page shows. Everything but the title may be empty; then its section is left out."""

    title: str  # the recipe
    summary: str = ""  # what was trained, in a sentence
    command: str = ""
    facts: dict[str, object] = field(default_factory=dict)  # top of the page: seed, steps, time, device, ...
    notes: list[str] = field(default_factory=list)  # what a reader must know first
    scores: list[ScoreRow] = field(default_factory=list)
    meanings: dict[str, str] = field(default_factory=dict)  # one line for each score, with chance and perfect
    rates: frozenset[str] | None = None  # scores that are shares of n clips; None: those that can be
    samples: list[tuple[str, Path]] = field(default_factory=list)  # caption, mp4 or picture
    sheet: Path | None = None  # contact sheet or reconstruction sheet
    curves: dict[str, Points] = field(default_factory=dict)  # as `read_curves` gives them
    timings: dict[str, float] = field(default_factory=dict)  # seconds by part of the run
    settings: dict[str, Any] = field(default_factory=dict)  # resolved config, secrets masked by the caller
    environment: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # data item -> reason


def write_report(folder: str | Path, report: Report) -> Path:
    """Writes report.html into the run folder, whole or not at all. Raises StorageError.

    Sample and sheet paths are absolute or relative to `folder`. Files that are missing, or too large for the page
    (4 MiB each, 16 MiB together), are named and linked instead.
    """
    folder = Path(folder)
    media = _Media(folder)
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
        title=join(report.title), header=_header(report), sections=sections
    )
    path = folder / "report.html"
    with storing(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page)
    return path


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl, one object a line: {"step": 3, "loss": 0.9, ...} -> (step, value) by name, steps increasing.

    Where a step was written twice (a resumed run) the later line counts. A line that a kill has cut short is passed
    over, and so is what is not a number. No file: no curves.
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


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a share `rate` of `n` independent trials (Wilson 1927); sensible at 0 and 1."""
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def rates_of(scores: Sequence[ScoreRow]) -> frozenset[str]:
    """Scores whose every value is a whole number of clips out of n: those that can be rates."""

    def share(row: ScoreRow, name: str) -> bool:
        hits = row.values.get(name, 0.0) * row.n
        return row.n > 0 and -1e-3 < hits < row.n + 1e-3 and abs(hits - round(hits)) < 1e-3

    return frozenset(name for name in _names(scores) if all(share(row, name) for row in scores))


def terminal_table(
    scores: Sequence[ScoreRow],
    meanings: Mapping[str, str],
    rates: frozenset[str] | None = None,
    width: int = 100,
) -> str:
    """The scores as plain text: a row for each kind of clips, intervals of the first, then the meanings."""
    if not scores:
        return ""
    rates = rates_of(scores) if rates is None else rates
    names = _names(scores)
    table = [["", *names]]
    for i, row in enumerate(scores):
        table.append([row.name, *(_value(row.values.get(name)) for name in names)])
        spans = [_span(row, name) if name in rates else "" for name in names]
        if i == 0 and any(spans):
            table.append(["  95 % interval", *spans])
    widths = [max(len(line[i]) for line in table) for i in range(len(names) + 1)]
    lines = []
    for line in table:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    explained = [name for name in names if meanings.get(name)]
    margin = 2 + max((len(name) for name in explained), default=0)
    lines += [""] if explained else []
    for name in explained:
        first = name.ljust(margin)
        lines += textwrap.wrap(meanings[name], width, initial_indent=first, subsequent_indent=" " * margin)
    counts = {row.n for row in scores}
    if len(counts) == 1:
        lines[0] = f"{counts.pop()} clips".ljust(widths[0])[: widths[0]] + lines[0][widths[0] :]
    return "\n".join(lines)


def _names(scores: Iterable[ScoreRow]) -> list[str]:
    return list(dict.fromkeys(name for row in scores for name in row.values))


def _value(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else number(value)


def _span(row: ScoreRow, name: str, between: str = "-") -> str:
    if row.values.get(name) is None or math.isnan(row.values[name]) or row.n < 1:
        return ""
    low, high = wilson(min(max(row.values[name], 0.0), 1.0), row.n)
    return f"{low:.2f}{between}{high:.2f}"


def _scores(report: Report) -> Markup:
    if not report.scores:
        return Markup()
    rates = rates_of(report.scores) if report.rates is None else report.rates
    names, model = _names(report.scores), report.scores[0]
    tiles = [
        el(
            "div",
            el("h3", name),
            el("p", _value(model.values.get(name)), class_="figure"),
            el("p", f"95 %: {_span(model, name, EN_DASH)}" if name in rates else "", class_="span"),
            el("p", report.meanings.get(name, ""), class_="meaning"),
            class_="tile",
        )
        for name in names
    ]
    header = el("tr", el("th", "clips"), *(el("th", name, class_="num") for name in names), el("th", "n", class_="num"))
    body = []
    for i, row in enumerate(report.scores):
        cells = [_cell(report.scores, row, name, name in rates) for name in names]
        body.append(
            el("tr", el("th", row.name), *cells, el("td", f"{row.n:,}", class_="num n"), class_="model" if i == 0 else None)
        )
    legend = "Bars run from 0 to the best possible value, or to the largest value of the column. "
    if rates:
        legend += f"Whiskers and ranges are 95 % Wilson intervals ({', '.join(n for n in names if n in rates)})."
    return _section(
        "Scores",
        el("div", *tiles, class_="tiles"),
        el("div", el("table", el("thead", header), el("tbody", *body), class_="scores"), class_="scroll"),
        el("p", legend, class_="quiet small"),
    )
