"""Line charts as SVG with the colours of the page (CSS variables), for light and dark alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sandbox.reports.markup import Markup, el, join

Points = Sequence[tuple[int, float]]  # (step, value), steps increasing

WIDTH, HEIGHT = 540, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 26  # room for the numbers at the axes
MOST_POINTS = 400  # of one drawn line, about
FEW = 40  # up to so many measurements are shown as dots, unsmoothed
COLOURS = 6  # --c0 .. --c5 in the page


def line_chart(title: str, series: dict[str, Points], log_x: bool = False) -> Markup:
    """One `<figure>`: measurements faint, smoothed on top, last smoothed value in the heading.

    A series without finite values is left out. The value axis is logarithmic where the smoothed
    values span more than a factor of 50 (a learning rate never).
    """
    cleaned = {name: _finite(points) for name, points in series.items()}
    raw = {name: p for name, p in cleaned.items() if len(p)}
    lines = {name: smoothed(p) for name, p in raw.items()}
    keys = []
    for i, (name, line) in enumerate(lines.items()):
        swatch = el("i", class_="swatch", style=f"background:var(--c{i % COLOURS})")
        label = f"{name} " if len(raw) > 1 else ""
        keys.append(el("span", swatch, label, el("b", number(float(line[-1, 1]))), class_="key"))
    heading = el("figcaption", el("span", title, class_="chart-title"), *keys)
    if not raw:
        return el(
            "figure", heading, el("p", "nothing finite was logged", class_="quiet"), class_="chart"
        )
    return el("figure", heading, _plot(title, raw, lines, log_x), class_="chart")


def _plot(
    title: str, raw: dict[str, np.ndarray], smoothed: dict[str, np.ndarray], log_x: bool
) -> Markup:
    first, last = min(p[0, 0] for p in raw.values()), max(p[-1, 0] for p in raw.values())
    first = max(first, 1) if log_x else min(first, 0)
    x = _Axis(first, max(last, first + 1), LEFT, WIDTH - RIGHT, log_x)
    y = _value_axis(title, list(raw.values()), list(smoothed.values()))
    drawn = []
    for i, name in enumerate(raw):
        colour = f"var(--c{i % COLOURS})"
        if len(raw[name]) > FEW:
            drawn.append(el("path", d=_path(raw[name], x, y), class_="raw", stroke=colour))
        else:
            places = [(_f(x.at(step)), _f(y.at(value))) for step, value in raw[name]]
            drawn += [el("circle", cx=cx, cy=cy, r=2.4, fill=colour) for cx, cy in places]
        drawn.append(el("path", d=_path(smoothed[name], x, y), class_="line", stroke=colour))
    # an inner picture with the same coordinates cuts off what leaves it
    left, top, width, height = LEFT, TOP - 4, WIDTH - LEFT - RIGHT + 4, HEIGHT - TOP - BOTTOM + 6
    box = f"{left} {top} {width} {height}"
    inner = el("svg", *drawn, x=left, y=top, width=width, height=height, viewBox=box)
    grid = (_y_grid(y), _x_grid(x))
    return el("svg", el("title", title), *grid, inner, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


# --- axes -----------------------------------------------------------------------------------------


class _Axis:
    """A linear or logarithmic scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(v, low)) for v in (value, low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        if self.log:
            decades = log_ticks(self.low, self.high, most)
            if len(decades) > 1:
                return decades
        return nice_ticks(self.low, self.high, most)


def _value_axis(title: str, raw: list[np.ndarray], smoothed: list[np.ndarray]) -> _Axis:
    """Holds the smoothed lines and 98 % of the measurements: a spike does not flatten a curve."""
    # the first few points of many are not smoothed yet, and often wild
    lines = np.concatenate([s[5 if len(s) > FEW else 0 :, 1] for s in smoothed])
    spread = np.concatenate([np.percentile(p[:, 1], [1, 99]) for p in raw])
    low, high = min(lines.min(), spread.min()), max(lines.max(), spread.max())
    typical_low, typical_high = np.percentile(lines, [5, 95])
    is_rate = title.split("/")[-1].lower().startswith("lr")
    if low > 0 and typical_high > 50 * typical_low and not is_rate:
        return _Axis(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, log=True)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    room = 0.05 * (high - low) or abs(high) or 1.0
    return _Axis(low and low - room, high + room, HEIGHT - BOTTOM, TOP, log=False)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        f * power for f in (1, 2, 5, 10, 20) if (high - low) / (f * power) <= most - 1 or f == 20
    )
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten in [low, high]; with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def _y_grid(y: _Axis) -> Markup:
    marks = []
    for value, label in _labelled(y.ticks(6)):
        at = _f(y.at(value))
        marks.append(el("path", d=f"M{LEFT} {at}H{WIDTH - RIGHT}", class_="grid"))
        marks.append(el("text", label, x=LEFT - 8, y=at, dy="0.32em", text_anchor="end"))
    return join(*marks)


def _x_grid(x: _Axis) -> Markup:
    bottom = HEIGHT - BOTTOM
    marks = [el("path", d=f"M{LEFT} {bottom}H{WIDTH - RIGHT}", class_="axis")]
    for value, label in _labelled(x.ticks(7)):
        at = _f(x.at(value))
        marks.append(el("path", d=f"M{at} {bottom}v4", class_="axis"))
        marks.append(el("text", label, x=at, y=bottom + 17, text_anchor="middle"))
    return join(*marks)


def _labelled(ticks: list[float]) -> list[tuple[float, str]]:
    """Short labels, longer ones where two would read the same."""
    labels = [number(t) for t in ticks]
    if len(set(labels)) < len(labels):
        labels = [f"{t:.6g}" for t in ticks]
    return list(zip(ticks, labels, strict=True))


def number(value: float) -> str:
    """Three significant digits: 0, 0.473, 1.2k, 4e-05."""
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


# --- points ---------------------------------------------------------------------------------------


def _finite(points: Points) -> np.ndarray:
    """(N, 2) float64, sorted by step, without NaN and infinities."""
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[np.argsort(array[:, 0], kind="stable")]


def smoothed(points: np.ndarray) -> np.ndarray:
    """Running means over 6 % of the points, shorter near the start, where a loss falls fast.

    Few points, and curves that are smooth already (a learning rate), are returned as they are.
    """
    count = len(points)
    if count <= FEW:
        return points
    place = np.arange(count)
    reach = np.minimum(0.03 * count, 0.2 * place).astype(int)
    first, end = place - reach, np.minimum(place + reach + 1, count)
    values = points[:, 1]
    for _ in range(2):  # twice: a triangular window, whose result has no steps
        total = np.concatenate([[0.0], values.cumsum()])
        values = (total[end] - total[first]) / (end - first)
    wiggle, left = (np.abs(np.diff(v)).sum() for v in (points[:, 1], values))
    return points if wiggle < 2 * left else np.stack([points[:, 0], values], 1)


def _thinned(points: np.ndarray, x: _Axis) -> np.ndarray:
    """The lowest and the highest point of every 2 pixels or so: spikes survive."""
    if len(points) <= MOST_POINTS:
        return points
    place = np.array([x.at(step) for step in points[:, 0]])
    column = ((place - x.start) / (x.end - x.start) * MOST_POINTS / 2).astype(int)
    kept: set[int] = {0, len(points) - 1}
    for part in np.split(np.arange(len(points)), np.flatnonzero(np.diff(column)) + 1):
        values = points[part, 1]
        kept |= {int(part[values.argmin()]), int(part[values.argmax()])}
    return points[sorted(kept)]


def _path(points: np.ndarray, x: _Axis, y: _Axis) -> str:
    points = _thinned(points, x)
    return "M" + "L".join(f"{_f(x.at(s))} {_f(y.at(v))}" for s, v in points)


def _f(pixels: float) -> str:
    return f"{pixels:.1f}"
