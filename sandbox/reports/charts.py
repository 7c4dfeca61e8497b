"""Line charts of a run page: matplotlib SVG, in the CSS colours of the page (light and dark)."""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup

from sandbox.reports.tables import format_number

Points = Sequence[tuple[float, float]]  # (step, value), steps increasing

COLOURS = ("#0b6e62", "#c2570c", "#4c5fd5", "#b0307a", "#8a6d00", "#5d6770")  # --c0 .. --c5
CSS = {c: f"var(--c{i})" for i, c in enumerate(COLOURS)} | {
    "#e3e4e1": "var(--line)", "#5c6269": "var(--soft)", "#17191c": "var(--ink)",
    "#ffffff": "var(--card)", "#f3f3ef": "var(--wash)",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9a9d98",
    "axes.grid": True, "grid.color": "#e3e4e1", "grid.linewidth": 0.6,
    "xtick.color": "#5c6269", "ytick.color": "#17191c", "legend.frameon": False,
    "svg.hashsalt": "sandbox", "svg.fonttype": "path",
}  # fmt: skip
INLINE: dict[Any, Any] = STYLE | {
    "svg.fonttype": "none", "axes.facecolor": "none", "figure.facecolor": "none",
    "ytick.color": "#5c6269", "path.simplify_threshold": 0.7,  # points; bounds the page's size
}  # fmt: skip
FEW = 40  # up to this many measurements are shown as dots, unsmoothed


def line_chart(title: str, series: dict[str, Points], log_x: bool = False) -> dict[str, Any]:
    """Faint measurements under smoothed lines. Series without finite values are left out.

    `keys`: (name, last smoothed value) per series. `svg` is None without finite values.
    """
    cleaned = {name: points for name, raw in series.items() if len(points := _finite(raw))}
    keys = [(name, format_number(float(smooth(p)[-1, 1]))) for name, p in cleaned.items()]
    svg = inline_svg(draw, title, cleaned, log_x) if cleaned else None
    return {"title": title, "keys": keys, "svg": svg}


def draw(title: str, series: dict[str, np.ndarray], log_x: bool = False) -> Any:
    """A matplotlib figure; series: name -> (N, 2) finite points."""
    from matplotlib.figure import Figure

    figure = Figure((5.4, 2.36), layout="constrained")
    axes = figure.subplots()
    for i, points in enumerate(series.values()):
        style: dict[str, Any] = {"lw": 1, "alpha": 0.32} if len(points) > FEW else {"marker": "."}
        axes.plot(*points.T, color=COLOURS[i % len(COLOURS)], **style)
        axes.plot(*smooth(points).T, color=COLOURS[i % len(COLOURS)], lw=1.8)
    low, high, log_y = value_range(title, [*series.values()])
    axes.set_yscale("log" if log_y else "linear")
    axes.set_ylim(low, high)
    first = min(p[0, 0] for p in series.values())
    last = max(p[-1, 0] for p in series.values())
    first = max(first, 1) if log_x else min(first, 0)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_xlim(first, max(last, first + 1))
    axes.grid(axis="x", visible=False)
    return figure


def inline_svg(draw: Any, *args: Any) -> Markup:
    """The figure of draw(*args) as an `<svg>` element with the page's colours and fonts."""
    from matplotlib import rc_context

    written = StringIO()
    # element ids hash the salt: two drawings of one page must not share them
    style: Any = INLINE | {"svg.hashsalt": repr(args)}
    with rc_context(style):
        draw(*args).savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), svg)
    return Markup(re.sub("|".join(CSS), lambda m: CSS[m[0]], svg))


def value_range(title: str, series: list[np.ndarray]) -> tuple[float, float, bool]:
    """Limits that hold the smoothed lines and 98 % of the measurements, and whether to use a
    logarithmic axis: where smoothed values span more than a factor of 50 (never for an lr).
    """
    # the first few of many points are barely smoothed, and often outliers
    lines = np.concatenate([smooth(p)[5 if len(p) > FEW else 0 :, 1] for p in series])
    spread = np.concatenate([np.percentile(p[:, 1], [1, 99]) for p in series])
    low, high = min(lines.min(), spread.min()), max(lines.max(), spread.max())
    typical_low, typical_high = np.percentile(lines, [5, 95])
    is_lr = title.split("/")[-1].lower().startswith("lr")
    if low > 0 and typical_high > 50 * typical_low and not is_lr:
        return low / 1.1, high * 1.1, True
    if 0 <= low <= 0.6 * high:
        low = 0.0
    margin = 0.05 * (high - low) or abs(high) or 1.0
    return low and low - margin, high + margin, False


def _finite(points: Points) -> np.ndarray:
    """(N, 2) float64, sorted by step, without NaN and infinities."""
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[np.argsort(array[:, 0], kind="stable")]


def smooth(points: np.ndarray) -> np.ndarray:
    """(N, 2) -> (N, 2): running means over 6 % of the points, fewer near the start.

    Short curves, and curves that are smooth already (a learning rate), are returned unchanged.
    """
    count = len(points)
    if count <= FEW:
        return points
    index = np.arange(count)
    reach = np.minimum(0.03 * count, 0.2 * index).astype(int)
    first, end = index - reach, np.minimum(index + reach + 1, count)
    values = points[:, 1]
    for _ in range(2):  # twice gives a triangular window, whose result has no steps
        total = np.concatenate([[0.0], values.cumsum()])
        values = (total[end] - total[first]) / (end - first)
    before, after = (np.abs(np.diff(v)).sum() for v in (points[:, 1], values))
    return points if before < 2 * after else np.stack([points[:, 0], values], 1)
