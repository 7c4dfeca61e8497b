"""Writes an ablation: Markdown, a self-contained HTML page, LaTeX, JSON and figures.

The same runs give the same bytes: no dates, no absolute paths, no randomness.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sandbox.reports import ablation_tables as tables
from sandbox.reports import media
from sandbox.reports.ablation import Ablation
from sandbox.reports.ablation_runs import COSTS
from sandbox.reports.figures import draw_curves, draw_intervals
from sandbox.reports.pages import Media, render
from sandbox.storage.atomic import storing, write_atomic

MOST_SHOWN = 8  # variants with samples
MOST_PROMPTS = 4
LISTED = 200  # rows of a table on the page; Markdown and LaTeX have all
FIGURES = ("intervals.svg", "intervals.pdf", "curves.svg", "curves.pdf", "samples.png")


def write_ablation(folder: Path, found: Ablation) -> Path:
    """Writes report.html, report.md, report.tex, report.json and figures; returns the page."""
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            (folder / name).unlink(missing_ok=True)
        intervals = draw_intervals(folder / "intervals", found)
        curves = draw_curves(folder / "curves", found)
        samples = common_samples(found)
        sheet = write_sheet(folder / "samples.png", samples) if samples.prompts else None
        figures = [p for p in (intervals, curves, sheet) if p is not None]
        write_atomic(folder / "report.json", json.dumps(tables.plain(found), indent=1) + "\n")
        write_atomic(folder / "report.md", tables.markdown(found, figures))
        write_atomic(folder / "report.tex", tables.latex(found, figures))
        page = folder / "report.html"
        write_atomic(page, html(folder, found, intervals, curves, samples))
    return page


@dataclass
class Samples:
    """Sample files of one seed and equal prompts: files[label][file name], prompts[file name]."""

    seed: int = 0
    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)


def common_samples(found: Ablation) -> Samples:
    """Samples that the first variants all have, of a seed that they all have; may be empty."""
    shown = found.variants[:MOST_SHOWN]
    seeds = set.intersection(*(set(v.runs) for v in shown))
    samples = Samples(min(seeds, default=0))
    if not seeds:
        return samples
    for variant in shown:
        paths = (variant.runs[samples.seed].folder / "samples").glob("[0-9]*-*")
        kept = sorted(p for p in paths if p.suffix in (".mp4", ".png"))
        samples.files[variant.label] = {p.name: p for p in kept}
    common = set.intersection(*(set(f) for f in samples.files.values()))
    for name in sorted(common)[:MOST_PROMPTS]:
        samples.prompts[name] = Path(name).stem.partition("-")[2].replace("-", " ")
    return samples


def write_sheet(path: Path, samples: Samples) -> Path:
    """A contact sheet: a row per prompt, a column per variant."""
    rows = [
        media.SheetRow(prompt, {k: _thinned(decoded(f[name])) for k, f in samples.files.items()})
        for name, prompt in samples.prompts.items()
    ]
    media.contact_sheet(path, rows)
    return path


def _thinned(frames: np.ndarray) -> np.ndarray:
    """First, middle and last frame, so that many variants fit side by side."""
    return frames[sorted({0, len(frames) // 2, len(frames) - 1})]


def decoded(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a video or an image."""
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))[None]
    import av

    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def html(
    folder: Path, found: Ablation, intervals: Path | None, curves: Path | None, samples: Samples
) -> str:
    embedded = Media(folder)
    runs = {
        e.folder.name: f"{v.label}, seed {s}" for v in found.variants for s, e in v.runs.items()
    }
    return render(
        "ablation",
        kind="Ablation report",
        title=found.title,
        summary=tables.summary(found),
        command="",
        facts={
            "variants": len(found.variants),
            "runs": len(runs),
            "baseline": f"{found.baseline.label}: {found.baseline.title}",
        },
        notes=found.notes,
        found=found,
        variants=found.variants[:LISTED],
        method=tables.method(found),
        explained={m: found.meanings[m] for m in found.metrics if found.meanings.get(m)},
        intervals=intervals and _svg_uri(intervals),
        curves=curves and _svg_uri(curves),
        costs={name: COSTS[name] for name in tables.cost_names(found)},
        samples=samples,
        clips=[
            (prompt, [embedded.item(files[name], prompt) for files in samples.files.values()])
            for name, prompt in samples.prompts.items()
        ],
        hidden=len(found.variants) - len(samples.files),
        protocols={f"{m}: {k}": v for m, p in found.protocols.items() for k, v in p.items()},
        runs=dict([*runs.items()][:LISTED]),
        **{name: getattr(tables, name) for name in ("value", "bounds", "p_value", "cost")},
    )


def _svg_uri(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
