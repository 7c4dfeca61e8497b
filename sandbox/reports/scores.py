"""Scores of clips: intervals for rates, and a table for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sandbox.reports.charts import number

Z95 = 1.959964  # 97.5 % quantile of the standard normal


@dataclass
class ScoreRow:
    """Scores of one kind of clips. The first row is the model, the others are for comparison."""

    name: str  # "this model", "real clips", "first-stage ceiling", "mean clip", "untrained model"
    values: dict[str, float]
    n: int  # clips that were judged


def names_of(scores: Iterable[ScoreRow]) -> list[str]:
    """Every score that any row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in scores for name in row.values))


def rates_of(scores: Sequence[ScoreRow]) -> frozenset[str]:
    """Scores whose every value is a whole number of clips out of n: those that can be rates."""

    def share(row: ScoreRow, name: str) -> bool:
        hits = row.values.get(name, math.nan) * row.n
        return math.isnan(hits) or (0 <= hits < row.n + 1e-3 and abs(hits - round(hits)) < 1e-3)

    return frozenset(name for name in names_of(scores) if all(share(row, name) for row in scores))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` independent trials (Wilson 1927); sensible at 0 and 1."""
    if not 0 <= rate <= 1 or n < 1:
        raise ValueError(f"wilson: rate={rate}, n={n}: want a rate of 0 to 1 and n >= 1")
    centre = rate + Z95**2 / (2 * n)
    reach = Z95 * math.sqrt(rate * (1 - rate) / n + (Z95 / (2 * n)) ** 2)
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def interval(row: ScoreRow, name: str) -> tuple[float, float] | None:
    """95 % interval of a rate; None where the row has no such rate."""
    value = row.values.get(name, math.nan)
    if math.isnan(value) or not -1e-3 < value < 1 + 1e-3 or row.n < 1:
        return None
    return wilson(min(max(value, 0.0), 1.0), row.n)


def span(bounds: tuple[float, float] | None, between: str = "-") -> str:
    """ "0.14-0.25"; empty for None."""
    return f"{bounds[0]:.2f}{between}{bounds[1]:.2f}" if bounds else ""


def written(value: float | None) -> str:
    """Two digits after the point, fewer for large numbers; "-" for what is missing."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 1000 else number(value)


def terminal_table(
    scores: Sequence[ScoreRow],
    meanings: Mapping[str, str],
    rates: frozenset[str] | None = None,
    width: int = 100,
) -> str:
    """Plain text: a row for each kind of clips, intervals of the first, then the meanings.

    `rates`: scores that are shares of n clips; None takes those that can be.
    """
    if not scores:
        return ""
    rates = rates_of(scores) if rates is None else rates
    names, model = names_of(scores), scores[0]
    counts = {row.n for row in scores}
    table = [[f"{model.n:,} clips" if len(counts) == 1 else "", *names]]
    table += [[row.name, *(written(row.values.get(n)) for n in names)] for row in scores]
    spans = [span(interval(model, n)) if n in rates else "" for n in names]
    if any(spans):
        table.insert(2, ["  95 % interval", *spans])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *numbers in table:
        cells = [number.rjust(w) for number, w in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    explained = [n for n in names if meanings.get(n)]
    if not explained:
        return "\n".join(lines)
    margin = 2 + max(map(len, explained))
    lines.append("")
    for name in explained:
        said = textwrap.fill(meanings[name], max(width - margin, 20))
        lines.append(f"{name:{margin}}" + said.replace("\n", "\n" + " " * margin))
    return "\n".join(lines)
