"""A comparison of runs written down: Markdown, one self-contained HTML page, LaTeX, and pictures.

The same runs give the same bytes: no dates, no paths of this machine, nothing random.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from sandbox import media
from sandbox.ablation import Ablation, Cell, Variant
from sandbox.ablation_runs import COSTS
from sandbox.charts import number
from sandbox.figures import draw_curves, draw_intervals
from sandbox.files import storing, write_atomic
from sandbox.markup import Markup, el, join
from sandbox.report import EN_DASH, TEMPLATE, Media, folded, pairs, section
from sandbox.statistics import Estimate

MOST_SHOWN = 8  # variants with samples
MOST_PROMPTS = 4
LISTED = 200  # rows of a table on the page; Markdown and LaTeX have all
IN_LATEX = 4  # metrics of one table
STYLE = """<style>
.wide { width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.wide th, .wide td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; white-space: nowrap; }
.wide thead th { color: var(--soft); font-size: 12.5px; font-weight: 550; }
.wide td.num, .wide th.num { text-align: right; }
.wide td small { display: block; color: var(--soft); font-size: 11.5px; }
.wide tr.model { background: var(--accent-wash); }
.wide .out { color: var(--c1); font-weight: 650; }
.wide th:first-child, .wide td:first-child { padding-left: 8px; font-weight: 650; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.plot img { display: block; max-width: 100%; margin: 0 auto; }
.clips td { white-space: normal; vertical-align: middle; }
.clips video, .clips img { display: block; width: 100%; max-width: 128px; min-width: 72px; border-radius: 4px; image-rendering: pixelated; background: #000; }
</style>"""  # noqa: E501


def write_ablation(folder: Path, found: Ablation) -> Path:
    """Writes report.html, report.md, report.tex, report.json and pictures; the page's path."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("intervals", "curves"):
            for suffix in (".svg", ".pdf"):
                (folder / f"{old}{suffix}").unlink(missing_ok=True)
        (folder / "samples.png").unlink(missing_ok=True)
        intervals = draw_intervals(folder / "intervals", found)
        curves = draw_curves(folder / "curves", found)
        clips = equal_samples(found)
        sheet = write_sheet(folder / "samples.png", clips) if clips.prompts else None
        pictures = [p for p in (intervals, curves, sheet) if p is not None]
        write_atomic(folder / "report.json", json.dumps(plain(found), indent=1) + "\n")
        write_atomic(folder / "report.md", markdown(found, pictures))
        write_atomic(folder / "report.tex", latex(found, pictures))
        page = folder / "report.html"
        write_atomic(page, html(folder, found, intervals, curves, clips))
    return page


# --- numbers --------------------------------------------------------------------------------------


def digits(e: Estimate) -> int:
    """Digits after the point that the interval gives meaning to: two of its half-width."""
    reach = (e.high - e.low) / 2 if e.low is not None and e.high is not None else 0.0
    size = reach or abs(e.mean) / 10 or 1.0
    return min(max(1 - math.floor(math.log10(size)), 0), 6)


def value(e: Estimate, sign: str = "") -> str:
    return f"{e.mean:{sign}.{digits(e)}f}"


def bounds(e: Estimate, between: str = ", ") -> str:
    """ "[0.12, 0.34]"; empty where there is none."""
    if e.low is None or e.high is None:
        return ""
    return f"[{e.low:.{digits(e)}f}{between}{e.high:.{digits(e)}f}]"


def chance(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def told(cell: Cell) -> str:
    return f"{value(cell.here)} {bounds(cell.here)}".strip()


def told_difference(cell: Cell) -> str:
    """ "+0.12 [0.03, 0.21] p = 0.012 *"; empty for the baseline."""
    if cell.difference is None:
        return ""
    words = (value(cell.difference, "+"), bounds(cell.difference), chance(cell.p))
    return " ".join(filter(None, words)) + " *" * cell.stands_out


def told_cost(e: Estimate | None) -> str:
    if e is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if e.mean >= size:
            return f"{e.mean / size:.3g}{unit}"
    return number(e.mean)


def method(found: Ablation) -> list[str]:
    """How to read the numbers."""
    kinds = {c.here.of for c in found.cells.values() if c.here.has_interval}
    lines = []
    if "seeds" in kinds:
        lines.append("Mean over seeds with its 95 % interval (Student's t).")
    if "prompts" in kinds:
        lines.append("Where seeds are few: the 95 % interval over prompts (resampled).")
    if len(found.variants) > 1:
        lines.append(
            f"Differences are to {found.baseline.label} ({found.baseline.title}), paired by seed "
            "or prompt; p-values are two-sided, corrected over the variants of a column (Holm); "
            "* is p < 0.05. Where all seeds differ by the same there is no test."
        )
    return lines


def summary(found: Ablation) -> str:
    seeds = sorted({len(v.runs) for v in found.variants})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    plural = "s" * (seeds[-1] > 1)
    count = len(found.variants)
    runs = sum(len(v.runs) for v in found.variants)
    return f"{count} variant{'s' * (count > 1)}, {many} seed{plural} each, {runs} runs"


def costs_of(found: Ablation) -> list[str]:
    """Costs that any variant has."""
    return [name for name in COSTS if any(name in c for c in found.costs.values())]


# --- tables ---------------------------------------------------------------------------------------


def tables(found: Ablation) -> list[tuple[str, list[list[str]]]]:
    """(heading, rows with a header first) of scores, differences and costs, as plain text."""

    def start(v: Variant) -> list[str]:
        return [v.label, *v.settings.values()]

    head = ["", *found.columns]
    scores = [[*head, "seeds", *found.metrics]]
    scores += [
        [*start(v), str(len(v.runs)), *(told(found.cells[v.label, m]) for m in found.metrics)]
        for v in found.variants
    ]
    result = [("Scores", scores)]
    if len(found.variants) > 1:
        rows = [
            [*start(v), *(told_difference(found.cells[v.label, m]) for m in found.metrics)]
            for v in found.variants
            if v is not found.baseline
        ]
        heading = f"Difference to {found.baseline.label} ({found.baseline.title})"
        result.append((heading, [[*head, *found.metrics], *rows]))
    if names := costs_of(found):
        rows = [
            [*start(v), *(told_cost(found.costs[v.label].get(n)) for n in names)]
            for v in found.variants
        ]
        result.append(("Cost", [[*head, *(COSTS[n] for n in names)], *rows]))
    return result


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it also reads well in a terminal."""
    cells = [[c.replace("|", "\\|") for c in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def markdown(found: Ablation, pictures: Sequence[Path] = ()) -> str:
    parts = [f"# Ablation: {found.title}", summary(found) + "."]
    for heading, rows in tables(found):
        parts += [f"## {heading}", markdown_table(rows)]
        if heading == "Scores":
            parts += [" ".join(method(found))]
    parts += ["\n".join(f"- {note}" for note in found.notes)] if found.notes else []
    parts += [f"![{p.stem}]({p.name})" for p in pictures]
    explained = [f"- {m}: {found.meanings[m]}" for m in found.metrics if found.meanings.get(m)]
    parts += ["## What the scores mean", "\n".join(explained)] if explained else []
    return "\n\n".join(filter(None, parts)) + "\n"


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)


def latex(found: Ablation, pictures: Sequence[Path] = ()) -> str:
    """Tables for \\input; they want the packages booktabs and, for the pictures, graphicx."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    caption = escaped(" ".join([f"{found.title}: {summary(found)}.", *method(found)]))
    for first in range(0, len(found.metrics), IN_LATEX):
        names = found.metrics[first : first + IN_LATEX]
        head = [*found.columns, *names]
        rows = []
        for variant in found.variants:
            cells = [found.cells[variant.label, name] for name in names]
            rows.append([*map(escaped, variant.settings.values()), *map(_latex_cell, cells)])
        body = "\n".join(f"  {' & '.join(row)} \\\\" for row in rows)
        columns = "l" * len(found.columns) + "r" * len(names)
        parts.append(
            f"\\begin{{table}}\n\\centering\\small\n\\begin{{tabular}}{{{columns}}}\n"
            f"  \\toprule\n  {' & '.join(map(escaped, head))} \\\\\n  \\midrule\n{body}\n"
            f"  \\bottomrule\n\\end{{tabular}}\n\\caption{{{caption}}}\n\\end{{table}}"
        )
    for path in pictures:
        name = path.with_suffix(".pdf").name if path.suffix == ".svg" else path.name
        parts.append(
            f"\\begin{{figure}}\n\\centering\n\\includegraphics[width=\\linewidth]{{{name}}}\n"
            f"\\caption{{{path.stem.capitalize()}.}}\n\\end{{figure}}"
        )
    return "\n\n".join(parts) + "\n"


def _latex_cell(cell: Cell) -> str:
    e, mark = cell.here, r"^{*}" if cell.stands_out else ""
    if e.low is None or e.high is None:
        return f"${value(e)}{mark}$"
    return f"${value(e)}{mark}$ {{\\scriptsize {bounds(e)}}}"


def plain(found: Ablation) -> dict:
    """Everything as numbers, for other programs."""

    def of(e: Estimate | None) -> dict | None:
        if e is None:
            return None
        return {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n, "of": e.of, "p": e.p}

    variants = []
    for v in found.variants:
        cells = {m: found.cells[v.label, m] for m in found.metrics}
        numbers = {
            m: {**(of(c.here) or {}), "difference": of(c.difference), "corrected_p": c.p}
            for m, c in cells.items()
        }
        runs = {str(s): e.folder.name for s, e in v.runs.items()}
        costs = {name: e.mean for name, e in found.costs[v.label].items()}
        shown = {"label": v.label, "settings": v.settings, "runs": runs}
        variants.append(shown | {"numbers": numbers, "costs": costs})
    return {
        "columns": found.columns,
        "baseline": found.baseline.label,
        "metrics": found.metrics,
        "variants": variants,
        "protocols": found.protocols,
        "notes": found.notes,
    }


# --- samples --------------------------------------------------------------------------------------


class Samples:
    """Files of equal prompts and one seed: `files[label][name]`; `prompts` by name of the file."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.files: dict[str, dict[str, Path]] = {}
        self.prompts: dict[str, str] = {}


def equal_samples(found: Ablation) -> Samples:
    """Samples that the first variants all have of a seed that they all have; empty without any."""
    shown = found.variants[:MOST_SHOWN]
    seeds = set.intersection(*(set(v.runs) for v in shown))
    samples = Samples(min(seeds, default=0))
    if not seeds:
        return samples
    for variant in shown:
        folder = variant.runs[samples.seed].folder / "samples"
        samples.files[variant.label] = {
            p.name: p
            for p in sorted(folder.glob("[0-9]*-*"))
            if p.suffix in (".mp4", ".png") and p.name != "sheet.png"
        }
    common = set.intersection(*(set(f) for f in samples.files.values()))
    for name in sorted(common)[:MOST_PROMPTS]:
        samples.prompts[name] = Path(name).stem.partition("-")[2].replace("-", " ")
    return samples


def write_sheet(path: Path, samples: Samples) -> Path:
    """Rows are prompts, columns variants."""
    rows = [
        media.Row(prompt, {k: _three(decoded(f[name])) for k, f in samples.files.items()})
        for name, prompt in samples.prompts.items()
    ]
    media.contact_sheet(path, rows)
    return path


def _three(frames: np.ndarray) -> np.ndarray:
    """First, middle and last frame: many variants stand side by side."""
    return frames[sorted({0, len(frames) // 2, len(frames) - 1})]


def decoded(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a video or a picture."""
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))[None]
    import av

    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


# --- the page -------------------------------------------------------------------------------------


def html(
    folder: Path, found: Ablation, intervals: Path | None, curves: Path | None, clips: Samples
) -> str:
    facts = {
        "variants": len(found.variants),
        "runs": sum(len(v.runs) for v in found.variants),
        "baseline": f"{found.baseline.label}: {found.baseline.title}",
    }
    header = el(
        "header",
        el("p", "Ablation report", class_="eyebrow"),
        el("h1", found.title),
        el("p", summary(found), class_="summary"),
        el("dl", *(el("div", el("dt", k), el("dd", v)) for k, v in facts.items()), class_="facts"),
    )
    notes = [el("li", note) for note in found.notes]
    parts = [el("ul", *notes, class_="notes") if notes else Markup(), _scores(found)]
    if intervals is not None:
        parts.append(section("Intervals", _plot(intervals, "means with their intervals")))
    parts.append(_costs(found))
    if curves is not None:
        said = "Mean over seeds, smoothed; the band is the 95 % interval (3 seeds or more)."
        figure = _plot(curves, "learning curves")
        parts.append(section("Learning curves", figure, el("p", said, class_="quiet small")))
    if clips.prompts:
        parts.append(_clips(folder, clips, found))
    protocols = {f"{m}: {k}": v for m, p in found.protocols.items() for k, v in p.items()}
    runs = {
        e.folder.name: f"{v.label}, seed {s}" for v in found.variants for s, e in v.runs.items()
    }
    parts += [
        folded("How each number was computed", pairs(protocols)),
        folded("Runs", pairs(dict([*runs.items()][:LISTED]))),
    ]
    template = TEMPLATE.read_text(encoding="utf-8").replace("run report", "ablation report")
    template = template.replace("</head>", STYLE + "\n</head>")
    return Template(template).substitute(
        title=join(found.title), header=header, sections=join(*parts)
    )


def _plot(path: Path, alt: str) -> Markup:
    source = base64.b64encode(path.read_bytes()).decode("ascii")
    image = el("img", src=f"data:image/svg+xml;base64,{source}", alt=alt)
    return el("figure", image, class_="plot")


def _start(variant: Variant) -> list[Markup]:
    return [el("td", variant.label), *(el("td", v) for v in variant.settings.values())]


def _head(found: Ablation, *numbers: str) -> Markup:
    words = [el("th", c) for c in ("", *found.columns)]
    return el("thead", el("tr", *words, *(el("th", n, class_="num") for n in numbers)))


def _wide(head: Markup, rows: Sequence[Markup], class_: str = "wide") -> Markup:
    table = el("table", head, el("tbody", *rows[:LISTED]), class_=class_)
    more = len(rows) - LISTED
    rest = el("p", f"and {more} more in report.md", class_="quiet small") if more > 0 else ""
    return el("div", table, rest, class_="scroll")


def _scores(found: Ablation) -> Markup:
    rows = []
    for v in found.variants:
        cells = [_score(found.cells[v.label, m]) for m in found.metrics]
        mark = "model" if v is found.baseline else None
        rows.append(el("tr", *_start(v), *cells, class_=mark))
    explained = [
        el("li", el("b", m), f": {found.meanings[m]}")
        for m in found.metrics
        if found.meanings.get(m)
    ]
    return section(
        "Scores",
        _wide(_head(found, *found.metrics), rows),
        el("p", " ".join(method(found)), class_="quiet small"),
        el("ul", *explained, class_="quiet small") if explained else "",
    )


def _score(cell: Cell) -> Markup:
    """The mean, its interval, and the difference to the baseline, one below the other."""
    lines = [value(cell.here), el("small", bounds(cell.here, f" {EN_DASH} ").strip("[]"))]
    if cell.difference is not None:
        words = " ".join(filter(None, (value(cell.difference, "+"), chance(cell.p))))
        lines.append(el("small", words, class_="out" if cell.stands_out else None))
    return el("td", *lines, class_="num")


def _costs(found: Ablation) -> Markup:
    names = costs_of(found)
    if not names:
        return Markup()
    rows = [
        el(
            "tr",
            *_start(v),
            *(el("td", told_cost(found.costs[v.label].get(n)), class_="num") for n in names),
        )
        for v in found.variants
    ]
    heads = [COSTS[n] for n in names]
    return section("Cost", _wide(_head(found, *heads), rows))


def _clips(folder: Path, clips: Samples, found: Ablation) -> Markup:
    shown = Media(folder)
    titles = {v.label: v.title for v in found.variants}
    head = el("thead", el("tr", el("th"), *(el("th", k, title=titles[k]) for k in clips.files)))
    rows = [
        el(
            "tr",
            el("td", prompt),
            *(el("td", shown.show(files[name], prompt)) for files in clips.files.values()),
        )
        for name, prompt in clips.prompts.items()
    ]
    more = len(found.variants) - len(clips.files)
    said = f"The same prompts and seed ({clips.seed}) for all."
    said += f" {more} variants are not shown." if more else ""
    table = _wide(head, rows, "wide clips")
    return section("Samples side by side", table, el("p", said, class_="quiet small"))
