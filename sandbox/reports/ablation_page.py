"""Writes an ablation: Markdown, a self-contained HTML page, LaTeX, JSON and figures.

The same runs give the same bytes: no dates, no absolute paths, no randomness.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sandbox.reports import media
from sandbox.reports.ablation import Ablation, Cell, Variant
from sandbox.reports.ablation_runs import COSTS
from sandbox.reports.charts import COLOURS, STYLE, smooth
from sandbox.reports.pages import Media, render
from sandbox.reports.run_page import read_curves
from sandbox.reports.statistics import LEAST_SEEDS, LEVEL, Estimate
from sandbox.reports.tables import format_number, text_table
from sandbox.storage.atomic import storage_errors, write_atomic

MOST_ROWS = 40  # variants in the interval plot
MOST_LINES = 8  # variants in the curve plot
ACROSS = 4  # panels per row
MOST_POINTS = 400  # of one line
MOST_SHOWN = 8  # variants with samples
MOST_PROMPTS = 4
LISTED = 200  # rows of a table on the page; Markdown and LaTeX have all
FIGURES = ("intervals.svg", "intervals.pdf", "curves.svg", "curves.pdf", "samples.png")
SampleRow = tuple[str, dict[str, Path]]  # prompt, label of the variant -> file


def write_ablation(folder: Path, ablation: Ablation) -> Path:
    """Writes report.html, report.md, report.tex, report.json and figures; returns the page."""
    from matplotlib import rc_context

    page, sheet = folder / "report.html", folder / "samples.png"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            (folder / name).unlink(missing_ok=True)
        with rc_context(STYLE):
            draw_intervals(folder / "intervals", ablation)
            draw_curves(folder / "curves", ablation)
        seed, samples = common_samples(ablation)
        if samples:
            write_sheet(sheet, samples)
        plots = {p.stem: p for p in (folder / "intervals.svg", folder / "curves.svg") if p.exists()}
        figures = [*plots.values(), *([sheet] if samples else [])]
        write_atomic(folder / "report.json", json.dumps(plain(ablation), indent=1) + "\n")
        write_atomic(folder / "report.md", markdown(ablation, figures))
        write_atomic(
            folder / "report.tex", render("ablation.tex", ablation=ablation, figures=figures)
        )
        write_atomic(page, html(folder, ablation, plots, seed, samples))
    return page


# --- tables ---------------------------------------------------------------------------------------


def tables(ablation: Ablation) -> list[tuple[str, list[list[str]]]]:
    """(heading, rows with a header first) of scores, differences and costs, as plain text."""

    def table(
        heads: Iterable[str], variants: Iterable[Variant], texts: Callable[[Variant], list[str]]
    ) -> list[list[str]]:
        rows = ([v.label, *v.settings.values(), *texts(v)] for v in variants)
        return [["", *ablation.columns, *heads], *rows]

    def cells(variant: Variant) -> list[Cell]:
        return [ablation.cells[variant.label, m] for m in ablation.metrics]

    scores = table(
        ["seeds", *ablation.metrics],
        ablation.variants,
        lambda v: [str(len(v.runs)), *(c.here.text() for c in cells(v))],
    )
    others = [v for v in ablation.variants if v is not ablation.baseline]
    differences = table(ablation.metrics, others, lambda v: [c.difference_text for c in cells(v)])
    names = cost_names(ablation)
    costs = table(
        [COSTS[n] for n in names],
        ablation.variants if names else [],
        lambda v: [cost(ablation.costs[v.label].get(n)) for n in names],
    )
    base = f"{ablation.baseline.label} ({ablation.baseline.title})"
    named = (("Scores", scores), (f"Difference to {base}", differences), ("Cost", costs))
    return [(heading, rows) for heading, rows in named if rows[1:]]


def cost_names(ablation: Ablation) -> list[str]:
    """Costs that any variant has."""
    return [name for name in COSTS if any(name in c for c in ablation.costs.values())]


def cost(e: Estimate | None) -> str:
    if e is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if e.mean >= size:
            return f"{e.mean / size:.3g}{unit}"
    return format_number(e.mean)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it also reads well in a terminal."""
    return text_table([[c.replace("|", "\\|") for c in row] for row in rows], markdown=True)


def markdown(ablation: Ablation, figures: Sequence[Path] = ()) -> str:
    text = render(
        "ablation.md", ablation=ablation, figures=figures, tables=tables,
        markdown_table=markdown_table,
    )  # fmt: skip
    return text.rstrip("\n") + "\n"


def plain(ablation: Ablation) -> dict[str, Any]:
    """The contents of report.json."""

    def numbers(cell: Cell) -> dict[str, Any]:
        to_base = cell.difference and asdict(cell.difference)
        return {**asdict(cell.here), "difference": to_base, "corrected_p": cell.p}

    variants = [
        {
            "label": v.label,
            "settings": v.settings,
            "runs": {str(seed): e.folder.name for seed, e in v.runs.items()},
            "numbers": {m: numbers(ablation.cells[v.label, m]) for m in ablation.metrics},
            "costs": {name: e.mean for name, e in ablation.costs[v.label].items()},
        }
        for v in ablation.variants
    ]
    return {
        "columns": ablation.columns,
        "baseline": ablation.baseline.label,
        "metrics": ablation.metrics,
        "variants": variants,
        "protocols": ablation.protocols,
        "notes": ablation.notes,
    }


# --- figures --------------------------------------------------------------------------------------


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with `count` panels, at most ACROSS per row."""
    from matplotlib.figure import Figure

    across = min(ACROSS, count)
    down = math.ceil(count / across)
    figure = Figure((max(2.15 * across, 6.4) + 0.6, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, [*axes[:count]]


def _save(figure: Any, stem: Path) -> None:
    """Saves SVG (for the page) and PDF (for a paper) without dates."""
    for suffix, dates in ((".svg", {"Date": None}), (".pdf", {"CreationDate": None})):
        with media.replacing(stem.with_suffix(suffix)) as draft:
            figure.savefig(draft, format=suffix[1:], metadata=dates)


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


def draw_curves(stem: Path, ablation: Ablation) -> None:
    """Losses and scores during training: a panel per metric and protocol of the loss.

    Shows the baseline and the first other variants, MOST_LINES in total. Nothing is drawn without
    such curves.
    """
    rest = [v for v in ablation.variants if v is not ablation.baseline]
    shown = sorted([ablation.baseline, *rest[: MOST_LINES - 1]], key=ablation.variants.index)
    curves = {e.folder: read_curves(e.folder) for v in shown for e in v.runs.values()}
    recorded = dict.fromkeys(name for of_run in curves.values() for name in of_run)
    panels: dict[tuple[str, str], list[Variant]] = {}
    wanted = ("val/", "score/", "val_times/mean")
    for name in (n for n in recorded if n == "loss" or n.startswith(wanted)):
        for variant in shown:
            runs = [*variant.runs.values()]
            if all(name in curves[e.folder] for e in runs):
                protocol = str(sorted(runs[0].protocol("loss").items()))
                panels.setdefault((name, protocol), []).append(variant)
    if not panels:
        return
    styles = {v.label: (COLOURS[i % 6], ("-", "--")[i // 6]) for i, v in enumerate(shown)}
    figure, axes = _panels(len(panels), 2.1)
    lines: dict[str, Any] = {}
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

    lines = [dict(smooth(np.array(points, np.float64)).tolist()) for points in each]
    common = sorted(set.intersection(*map(set, lines)))
    if not common:
        return None
    steps = np.array(common[:: math.ceil(len(common) / MOST_POINTS)])
    values = np.array([[line[s] for s in steps.tolist()] for line in lines])
    if len(values) < LEAST_SEEDS:
        return steps, values.mean(0), None
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return steps, values.mean(0), quantile * sem(values)


def _shared(group: Sequence[Variant]) -> str:
    """The settings that a group shares: "vae=kl"."""
    first = group[0].settings
    same = {k: v for k, v in first.items() if all(o.settings[k] == v for o in group)}
    return ", ".join(f"{k}={v}" for k, v in same.items())


def _scale(panel: Any) -> None:
    """Logarithmic where values span more than a factor of 20."""
    values = np.concatenate([np.ones(0), *(line.get_ydata() for line in panel.get_lines())])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        panel.set_yscale("log")


# --- samples --------------------------------------------------------------------------------------


def common_samples(ablation: Ablation) -> tuple[int, list[SampleRow]]:
    """Samples that the first variants all have, of a seed that they all have; may be empty."""
    shown = ablation.variants[:MOST_SHOWN]
    seeds = set.intersection(*(set(v.runs) for v in shown))
    if not seeds:
        return 0, []
    seed = min(seeds)
    folders = {v.label: v.runs[seed].folder / "samples" for v in shown}
    files = (
        {p.name for p in folder.glob("[0-9]*-*") if p.suffix in (".mp4", ".png")}
        for folder in folders.values()
    )
    names = sorted(set.intersection(*files))[:MOST_PROMPTS]
    prompts = [Path(name).stem.partition("-")[2].replace("-", " ") for name in names]
    return seed, [
        (prompt, {label: folder / name for label, folder in folders.items()})
        for prompt, name in zip(prompts, names, strict=True)
    ]


def write_sheet(path: Path, samples: Sequence[SampleRow]) -> None:
    """A contact sheet: a row per prompt, a column per variant."""
    rows = [
        (prompt, {k: _three_frames(decode_frames(f)) for k, f in files.items()})
        for prompt, files in samples
    ]
    media.contact_sheet(path, rows)


def _three_frames(frames: np.ndarray) -> np.ndarray:
    """First, middle and last frame, so that many variants fit side by side."""
    return frames[sorted({0, len(frames) // 2, len(frames) - 1})]


def decode_frames(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a video or an image."""
    import av

    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


# --- page -----------------------------------------------------------------------------------------


def html(
    folder: Path, ablation: Ablation, plots: dict[str, Path], seed: int, samples: list[SampleRow]
) -> str:
    embedded = Media(folder)
    runs = {
        e.folder.name: f"{v.label}, seed {s}" for v in ablation.variants for s, e in v.runs.items()
    }
    baseline = f"{ablation.baseline.label}: {ablation.baseline.title}"
    return render(
        "ablation.html",
        kind="Ablation report",
        title=ablation.title,
        summary=ablation.summary,
        command="",
        facts={"variants": len(ablation.variants), "runs": len(runs), "baseline": baseline},
        notes=ablation.notes,
        ablation=ablation,
        variants=ablation.variants[:LISTED],
        plots={name: _svg_uri(path) for name, path in plots.items()},
        cost=cost,
        costs={name: COSTS[name] for name in cost_names(ablation)},
        seed=seed,
        sampled=ablation.variants[:MOST_SHOWN],
        clips=[
            (prompt, [embedded.item(file, prompt) for file in files.values()])
            for prompt, files in samples
        ],
        protocols={f"{m}: {k}": v for m, p in ablation.protocols.items() for k, v in p.items()},
        runs=dict([*runs.items()][:LISTED]),
    )


def _svg_uri(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
