"""Deterministic figures of an ablation: intervals and learning curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sandbox.reports.ablation import Ablation, Variant
from sandbox.reports.ablation_runs import Entry
from sandbox.reports.charts import COLOURS, STYLE, smoothed
from sandbox.reports.media import replacing
from sandbox.reports.run_page import read_curves
from sandbox.reports.statistics import LEAST_SEEDS, LEVEL

MOST_ROWS = 40  # variants in the interval plot
MOST_LINES = 8  # variants in the curve plot
ACROSS = 4  # panels per row
MOST_POINTS = 400  # of one line


@contextmanager
def _figure(panels: int, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with `panels` axes, at most ACROSS per row."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        across = min(ACROSS, panels)
        down = math.ceil(panels / across)
        figure = Figure(
            figsize=(max(2.15 * across, 6.4) + 0.6, height * down), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for unused in axes[panels:]:
            unused.set_visible(False)
        yield figure, [*axes[:panels]]


def _save(figure: Any, stem: Path) -> Path:
    """Saves SVG (for the page) and PDF (for a paper) without dates; returns the SVG's path."""
    for suffix, dates in ((".svg", {"Date": None}), (".pdf", {"CreationDate": None})):
        with replacing(stem.with_suffix(suffix)) as draft:
            figure.savefig(draft, format=suffix[1:], metadata=dates)
    return stem.with_suffix(".svg")


# --- intervals ------------------------------------------------------------------------------------


def draw_intervals(stem: Path, found: Ablation) -> Path | None:
    """A panel per metric: each variant's mean with its interval; the baseline's is a line."""
    shown = found.variants[:MOST_ROWS]
    if len(shown) < 2:
        return None
    with _figure(len(found.metrics), 0.62 + 0.17 * len(shown)) as (figure, panels):
        for i, (panel, name) in enumerate(zip(panels, found.metrics, strict=True)):
            panel.set_title(name)
            base = found.cells[found.baseline.label, name].here
            panel.axvline(base.mean, color=COLOURS[5], linewidth=0.8, linestyle=(0, (4, 3)))
            for row, variant in enumerate(shown):
                cell = found.cells[variant.label, name]
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
        return _save(figure, stem)


# --- curves ---------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Mean over seeds at their common steps, and the interval's half-width if there is one."""

    steps: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray | None


def curve_of(each: Sequence[Sequence[tuple[int, float]]]) -> Curve | None:
    """`each`: a curve per seed, smoothed and averaged; a t interval from 3 seeds on."""
    from scipy.stats import sem, t

    lines = [dict(smoothed(np.array(points, np.float64)).tolist()) for points in each if points]
    common = sorted(set.intersection(*map(set, lines))) if lines else []
    if not common:
        return None
    steps = np.array(common[:: math.ceil(len(common) / MOST_POINTS)])
    values = np.array([[line[s] for s in steps.tolist()] for line in lines])
    if len(values) < LEAST_SEEDS:
        return Curve(steps, values.mean(0), None)
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Curve(steps, values.mean(0), quantile * sem(values))


def draw_curves(stem: Path, found: Ablation) -> Path | None:
    """Losses and scores during training: a panel per metric and protocol.

    Shows the baseline and the first other variants, MOST_LINES in total.
    """
    rest = [v for v in found.variants if v is not found.baseline]
    shown = sorted([found.baseline, *rest[: MOST_LINES - 1]], key=found.variants.index)
    curves = {e.folder: _curves(e) for v in shown for e in v.runs.values()}
    names = dict.fromkeys(name for one in curves.values() for name in one)
    panels = [
        (name, group)
        for name in names
        for group in _by_protocol([v for v in shown if _has(v, name, curves)])
    ]
    if not panels:
        return None
    colours = {v.label: (COLOURS[i % 6], ("-", "--")[i // 6]) for i, v in enumerate(shown)}
    with _figure(len(panels), 2.1) as (figure, axes):
        handles: dict[str, Any] = {}
        for panel, (name, group) in zip(axes, panels, strict=True):
            several = [n for n, _ in panels].count(name) > 1
            shared = _shared(group) if several else ""
            panel.set_title(f"{name} ({shared})" if shared else name)
            for variant in group:
                curve = curve_of([curves[e.folder][name] for e in variant.runs.values()])
                if curve is None:
                    continue
                colour, dash = colours[variant.label]
                (line,) = panel.plot(curve.steps, curve.mean, dash, color=colour, lw=1.3)
                handles.setdefault(variant.label, line)
                if curve.half_width is not None:
                    low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
                    panel.fill_between(curve.steps, low, high, color=colour, alpha=0.14, lw=0)
            _scale(panel)
            panel.set_xlabel("step", color="#5c6269")
        order = sorted(handles, key=[v.label for v in shown].index)
        figure.legend(
            [handles[k] for k in order], order, loc="outside upper left", ncols=len(order)
        )
        return _save(figure, stem)


def _curves(entry: Entry) -> dict[str, list[tuple[int, float]]]:
    """The training loss, and metrics on held-out clips."""
    curves = read_curves(entry.folder / "metrics.jsonl")
    return {k: v for k, v in curves.items() if k == "loss" or k.startswith(("val/", "score/"))}


def _has(variant: Variant, name: str, curves: dict[Path, dict[str, Any]]) -> bool:
    return all(name in curves[e.folder] for e in variant.runs.values())


def _by_protocol(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Groups of variants with the same loss protocol."""
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        entry = next(iter(variant.runs.values()))
        groups.setdefault(str(sorted(entry.protocol("loss").items())), []).append(variant)
    return [*groups.values()]


def _shared(group: Sequence[Variant]) -> str:
    """The settings that a group shares: "vae=kl"."""
    first = group[0].settings
    same = {k: v for k, v in first.items() if all(o.settings[k] == v for o in group)}
    return ", ".join(f"{k}={v}" for k, v in same.items())


def _scale(panel: Any) -> None:
    """Logarithmic where values span more than a factor of 20."""
    values = np.concatenate([line.get_ydata() for line in panel.get_lines()] or [np.ones(1)])
    if values.min() > 0 and values.max() > 20 * values.min():
        panel.set_yscale("log")
