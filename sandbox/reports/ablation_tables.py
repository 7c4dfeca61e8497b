"""Tables of an ablation as text, Markdown, LaTeX and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.reports.ablation_runs import COSTS
from sandbox.reports.charts import number
from sandbox.reports.statistics import Estimate
from sandbox.reports.tables import text_table

if TYPE_CHECKING:
    from sandbox.reports.ablation import Ablation, Cell, Variant

IN_LATEX = 4  # metrics per table


# --- numbers --------------------------------------------------------------------------------------


def digits(e: Estimate) -> int:
    """Significant decimals: two digits of the interval's half-width."""
    half_width = (e.high - e.low) / 2 if e.low is not None and e.high is not None else 0.0
    size = half_width or abs(e.mean) / 10 or 1.0
    return min(max(1 - math.floor(math.log10(size)), 0), 6)


def value(e: Estimate, sign: str = "") -> str:
    return f"{e.mean:{sign}.{digits(e)}f}"


def bounds(e: Estimate, between: str = ", ") -> str:
    """ "[0.12, 0.34]"; empty without an interval."""
    if e.low is None or e.high is None:
        return ""
    return f"[{e.low:.{digits(e)}f}{between}{e.high:.{digits(e)}f}]"


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def mean_and_interval(cell: Cell) -> str:
    return f"{value(cell.here)} {bounds(cell.here)}".strip()


def difference(cell: Cell) -> str:
    """ "+0.12 [0.03, 0.21] p = 0.012 *"; empty for the baseline."""
    if cell.difference is None:
        return ""
    parts = (value(cell.difference, "+"), bounds(cell.difference), p_value(cell.p))
    return " ".join(filter(None, parts)) + " *" * cell.is_significant


def cost(e: Estimate | None) -> str:
    if e is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if e.mean >= size:
            return f"{e.mean / size:.3g}{unit}"
    return number(e.mean)


def method(found: Ablation) -> list[str]:
    """How the numbers were computed."""
    kinds = {c.here.of for c in found.cells.values() if c.here.has_interval}
    lines = []
    if "seeds" in kinds:
        lines.append("Mean over seeds with the 95 % interval (Student's t).")
    if "prompts" in kinds:
        lines.append("With fewer than 3 seeds: the 95 % bootstrap interval over prompts.")
    if len(found.variants) > 1:
        lines.append(
            f"Differences are relative to {found.baseline.label} ({found.baseline.title}), paired "
            "by seed or prompt. p-values are two-sided and Holm-corrected over the variants of a "
            "column; * is p < 0.05. No p-value is given when all paired differences are equal."
        )
    return lines


def summary(found: Ablation) -> str:
    seeds = sorted({len(v.runs) for v in found.variants})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    plural = "s" * (seeds[-1] > 1)
    count = len(found.variants)
    runs = sum(len(v.runs) for v in found.variants)
    return f"{count} variant{'s' * (count > 1)}, {span} seed{plural} each, {runs} runs"


def cost_names(found: Ablation) -> list[str]:
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
        [*start(v), str(len(v.runs)),
         *(mean_and_interval(found.cells[v.label, m]) for m in found.metrics)]
        for v in found.variants
    ]  # fmt: skip
    result = [("Scores", scores)]
    if len(found.variants) > 1:
        rows = [
            [*start(v), *(difference(found.cells[v.label, m]) for m in found.metrics)]
            for v in found.variants
            if v is not found.baseline
        ]
        heading = f"Difference to {found.baseline.label} ({found.baseline.title})"
        result.append((heading, [[*head, *found.metrics], *rows]))
    if names := cost_names(found):
        rows = [
            [*start(v), *(cost(found.costs[v.label].get(n)) for n in names)] for v in found.variants
        ]
        result.append(("Cost", [[*head, *(COSTS[n] for n in names)], *rows]))
    return result


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it also reads well in a terminal."""
    return text_table([[c.replace("|", "\\|") for c in row] for row in rows], markdown=True)


def markdown(found: Ablation, figures: Sequence[Path] = ()) -> str:
    parts = [f"# Ablation: {found.title}", summary(found) + "."]
    for heading, rows in tables(found):
        parts += [f"## {heading}", markdown_table(rows)]
        if heading == "Scores":
            parts += [" ".join(method(found))]
    parts += ["\n".join(f"- {note}" for note in found.notes)] if found.notes else []
    parts += [f"![{p.stem}]({p.name})" for p in figures]
    explained = [f"- {m}: {found.meanings[m]}" for m in found.metrics if found.meanings.get(m)]
    parts += ["## What the scores mean", "\n".join(explained)] if explained else []
    return "\n\n".join(filter(None, parts)) + "\n"


SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)


def latex(found: Ablation, figures: Sequence[Path] = ()) -> str:
    """Tables for \\input; needs the packages booktabs and, for figures, graphicx."""
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
    for path in figures:
        name = path.with_suffix(".pdf").name if path.suffix == ".svg" else path.name
        parts.append(
            f"\\begin{{figure}}\n\\centering\n\\includegraphics[width=\\linewidth]{{{name}}}\n"
            f"\\caption{{{path.stem.capitalize()}.}}\n\\end{{figure}}"
        )
    return "\n\n".join(parts) + "\n"


def _latex_cell(cell: Cell) -> str:
    e, mark = cell.here, r"^{*}" if cell.is_significant else ""
    if e.low is None or e.high is None:
        return f"${value(e)}{mark}$"
    return f"${value(e)}{mark}$ {{\\scriptsize {bounds(e)}}}"


def plain(found: Ablation) -> dict:
    """The contents of report.json."""

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
