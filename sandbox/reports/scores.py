"""Scores of clips: intervals for rates, and a table for a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import TextWrapper

from sandbox.reports.tables import format_number, text_table


@dataclass
class ScoreRow:
    """Scores of one kind of clips. The first row is the model; the others are references."""

    name: str  # "this model", "real clips", "first-stage ceiling", "mean clip", "untrained model"
    values: dict[str, float]
    n: int  # scored clips


def names_of(scores: Iterable[ScoreRow]) -> list[str]:
    """Every score of any row, in order of first appearance."""
    return list(dict.fromkeys(name for row in scores for name in row.values))


def interval(row: ScoreRow, name: str) -> tuple[float, float] | None:
    """95 % Wilson interval of a rate; None where the row has no such rate."""
    from scipy.stats import binomtest

    value = row.values.get(name, math.nan)
    if math.isnan(value) or not -1e-3 < value < 1 + 1e-3 or row.n < 1:
        return None
    bounds = binomtest(round(value * row.n), row.n).proportion_ci(0.95, method="wilson")
    return float(bounds.low), float(bounds.high)


def format_span(bounds: tuple[float, float] | None, between: str = "-") -> str:
    """ "0.14-0.25"; empty for None."""
    return f"{bounds[0]:.2f}{between}{bounds[1]:.2f}" if bounds else ""


def format_score(value: float | None) -> str:
    """Two decimals, fewer for large numbers; "-" for missing values."""
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= 1000:
        return format_number(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def terminal_table(
    scores: Sequence[ScoreRow],
    meanings: Mapping[str, str],
    rates: frozenset[str],
    width: int = 100,
) -> str:
    """A row for each kind of clips, intervals of the first row, then what each score means.

    `rates`: scores that are shares of n clips.
    """
    if not scores:
        return ""
    names, model = names_of(scores), scores[0]
    is_same_n = len({row.n for row in scores}) == 1
    table = [[f"{model.n:,} clips" if is_same_n else "", *names]]
    table += [[row.name, *(format_score(row.values.get(n)) for n in names)] for row in scores]
    spans = [format_span(interval(model, n)) if n in rates else "" for n in names]
    if any(spans):
        table.insert(2, ["  95 % interval", *spans])
    explained = [n for n in names if meanings.get(n)]
    margin = 2 + max(map(len, explained), default=0)
    wrapper = TextWrapper(max(width, margin + 20), subsequent_indent=" " * margin)
    lines = [wrapper.fill(f"{name:{margin}}{meanings[name]}") for name in explained]
    return "\n".join([text_table(table), *([""] if lines else []), *lines])
