"""Deterministic figures of an ablation: intervals and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sandbox.reports.ablation import Ablation, Variant
from sandbox.reports.ablation_runs import Entry
from sandbox.reports.charts import COLOURS, smoothed
from sandbox.reports.media import replacing
from sandbox.reports.run_page import read_curves
from sandbox.reports.statistics import LEAST_SEEDS, LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_ROWS = 40  # variants in the interval plot
MOST_LINES = 8  # variants in the curve plot
ACROSS = 4  # panels per row
MOST_POINTS = 400  # of one line


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most ACROSS per row."""
    from matplotlib.figure import Figure

    across = min(ACROSS, count)
    down = math.ceil(count / across)
    figure = Figure((max(2.15 * across, 6.4) + 0.6, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, [*axes[:count]]


def _save(figure: Figure, stem: Path) -> None:
    """Saves SVG (for the page) and PDF (for a paper) without dates."""
    for suffix, dates in ((".svg", {"Date": None}), (".pdf", {"CreationDate": None})):
        with replacing(stem.with_suffix(suffix)) as draft:
            figure.savefig(draft, format=suffix[1:], metadata=dates)


# --- intervals ------------------------------------------------------------------------------------


def draw_intervals(stem: Path, ablation: Ablation) -> None:
    """A panel per metric: each variant's mean with its interval; the baseline's is a line.

    Nothing is drawn of one variant.
    """
    shown = ablation.variants[:MOST_ROWS]
    if len(shown) < 2:
        return
    figure, panels = _panels(len(ablation.metrics), 0.62 + 0.17 * len(shown))
    for i, (panel, name) in enumerate(zip(panels, ablation.metrics, strict=True)):
        panel.set_title(name)
        base = ablation.cells[ablation.baseline.label, name].here
        panel.axvline(base.mean, color=COLOURS[5], linewidth=0.8, linestyle=(0, (4, 3)))
        for row, variant in enumerate(shown):
            cell = ablation.cells[variant.label, name]
            colour = COLOURS[1] if cell.is_significant else COLOURS[0]
            if cell.here.low is not None and cell.here.high is not None:
                panel.plot([cell.here.low, cell.here.high], [row, row], color=colour, lw=1.6)
            each = [e.values[name] for e in variant.runs.values()]
            panel.plot(each, [row] * len(each), ".", color=colour, alpha=0.35, ms=4, mew=0)
            panel.plot(cell.here.mean, row, "o", color=colour, ms=4)
        panel.set_ylim(len(shown) - 0.4, -0.6)
        panel.grid(axis="y", visible=False)
        labels = [v.label for v in shown] if i % ACROSS == 0 else [""] * len(shown)
        panel.set_yticks(range(len(shown)), labels)
        panel.tick_params(axis="y", length=0)
        panel.locator_params(axis="x", nbins=4)
    _save(figure, stem)


# --- curves ---------------------------------------------------------------------------------------


def draw_curves(stem: Path, ablation: Ablation) -> None:
    """Losses and scores during training: a panel per metric and protocol of the loss.

    Shows the baseline and the first other variants, MOST_LINES in total. Nothing is drawn without
    such curves.
    """
    rest = [v for v in ablation.variants if v is not ablation.baseline]
    shown = sorted([ablation.baseline, *rest[: MOST_LINES - 1]], key=ablation.variants.index)
    curves = {e.folder: _curves(e) for v in shown for e in v.runs.values()}
    panels: dict[tuple[str, str], list[Variant]] = {}
    for name in dict.fromkeys(name for of_run in curves.values() for name in of_run):
        for variant in shown:
            runs = [*variant.runs.values()]
            if all(name in curves[e.folder] for e in runs):
                protocol = str(sorted(runs[0].protocol("loss").items()))
                panels.setdefault((name, protocol), []).append(variant)
    if not panels:
        return
    styles = {v.label: (COLOURS[i % 6], ("-", "--")[i // 6]) for i, v in enumerate(shown)}
    figure, axes = _panels(len(panels), 2.1)
    lines: dict[str, Line2D] = {}
    for panel, ((name, _), group) in zip(axes, panels.items(), strict=True):
        several = [n for n, _ in panels].count(name) > 1
        shared = _shared(group) if several else ""
        panel.set_title(f"{name} ({shared})" if shared else name)
        absent = []
        for variant in group:
            curve = curve_of([curves[e.folder][name] for e in variant.runs.values()])
            if curve is None:
                absent.append(variant.label)
                continue
            steps, mean, half_width = curve
            colour, dash = styles[variant.label]
            (line,) = panel.plot(steps, mean, dash, color=colour, lw=1.3)
            lines.setdefault(variant.label, line)
            if half_width is not None:
                band = mean - half_width, mean + half_width
                panel.fill_between(steps, *band, color=colour, alpha=0.14, lw=0)
        _scale(panel)
        left_out = f" (seeds of {', '.join(absent)} share none)" if absent else ""
        panel.set_xlabel(f"step{left_out}", color="#5c6269")
    order = [v.label for v in shown if v.label in lines]
    if order:
        handles = [lines[label] for label in order]
        figure.legend(handles, order, loc="outside upper left", ncols=len(order))
    _save(figure, stem)


def curve_of(
    each: Sequence[Sequence[tuple[int, float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Steps, mean, and the half-width of a t interval (from 3 seeds on) of smoothed curves.

    `each`: a curve per seed. The steps are those that all seeds have; None without such steps.
    """
    from scipy.stats import sem, t

    lines = [dict(smoothed(np.array(points, np.float64)).tolist()) for points in each]
    common = sorted(set.intersection(*map(set, lines)))
    if not common:
        return None
    steps = np.array(common[:: math.ceil(len(common) / MOST_POINTS)])
    values = np.array([[line[s] for s in steps.tolist()] for line in lines])
    if len(values) < LEAST_SEEDS:
        return steps, values.mean(0), None
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return steps, values.mean(0), quantile * sem(values)


def _curves(entry: Entry) -> dict[str, list[tuple[int, float]]]:
    """The training loss, and metrics on held-out clips."""
    curves = read_curves(entry.folder)
    return {k: v for k, v in curves.items() if k == "loss" or k.startswith(("val/", "score/"))}


def _shared(group: Sequence[Variant]) -> str:
    """The settings that a group shares: "vae=kl"."""
    first = group[0].settings
    same = {k: v for k, v in first.items() if all(o.settings[k] == v for o in group)}
    return ", ".join(f"{k}={v}" for k, v in same.items())


def _scale(panel: Axes) -> None:
    """Logarithmic where values span more than a factor of 20."""
    values = np.concatenate([np.ones(0), *(line.get_ydata() for line in panel.get_lines())])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        panel.set_yscale("log")
