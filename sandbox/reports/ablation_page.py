"""A comparison of runs written down: Markdown, one self-contained HTML page, LaTeX, and pictures.

The same runs give the same bytes: no dates, no paths of this machine, nothing random.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from sandbox.reports import media
from sandbox.reports.ablation import Ablation, Cell, Variant
from sandbox.reports.ablation_runs import COSTS
from sandbox.reports.ablation_tables import (
    LISTED,
    MOST_PROMPTS,
    MOST_SHOWN,
    STYLE,
    bounds,
    chance,
    costs_of,
    latex,
    markdown,
    method,
    plain,
    summary,
    told_cost,
    value,
)
from sandbox.reports.figures import draw_curves, draw_intervals
from sandbox.reports.markup import Markup, el, join
from sandbox.reports.run_page import EN_DASH, TEMPLATE, Media, folded, pairs, section
from sandbox.storage.atomic import storing, write_atomic


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
