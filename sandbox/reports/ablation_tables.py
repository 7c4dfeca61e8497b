"""Tables of an ablation: its numbers as text, Markdown, LaTeX and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.reports.ablation_runs import COSTS
from sandbox.reports.charts import number
from sandbox.reports.statistics import Estimate

if TYPE_CHECKING:
    from sandbox.reports.ablation import Ablation, Cell, Variant

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
