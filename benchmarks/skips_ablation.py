"""Do long skips stabilise training, as EasyAnimateV2 claims (2405.18991, section 3.2)?

    python benchmarks/skips_ablation.py [--steps 100] [--seeds 3]

Trains `backbone=dit` with eight blocks and spatial attention on moving digits, with and without
long skips and motion modules. Runs of one seed share data, noise and initial weights; the learning
rate is high enough to make training unstable. A spike is a step whose loss (or gradient norm)
exceeds `LOSS_SPIKE` (`GRADIENT_SPIKE`) times the median of the `WINDOW` previous steps. The final
loss is the mean of the last tenth of the steps. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, installed, write

COMMON = (
    "backbone=dit", "backbone.attention=spatial", "backbone.num_blocks=8", "backbone.width=32",
    "data.batch_size=8", "lr=5e-3", "lr_schedule=constant", "lr_schedule.warmup=0", "ema=none",
    "trainer.clip=null", "trainer.threads=1", "logger=null",
)  # fmt: skip
SKIPS, MOTION = ("none", "uvit"), ("none", "vanilla")
LOSS_SPIKE, GRADIENT_SPIKE, WINDOW = 1.5, 4.0, 20
NO_SPIKES = (
    "No network had a spike, with or without skips: at this size, learning rate and length, the "
    "claim is neither confirmed nor refuted. It was made for 28 blocks of width 1152; more steps, "
    "more blocks or a higher lr may show the effect (COMMON in the script)."
)


def trained(skips: str, motion: str, seed: int, steps: int, out: Path) -> dict[str, list[float]]:
    """Trains one network; returns loss and gradient norm of every step."""
    from sandbox import compose
    from sandbox.config.wiring import wire
    from sandbox.contracts import Diverged
    from sandbox.runs.resume import open_root
    from sandbox.training.build import build_system
    from sandbox.training.loop import fit
    from sandbox.training.setup import start

    root = compose(
        *COMMON, f"backbone.skips={skips}", f"backbone.motion_module={motion}", f"seed={seed}",
        f"steps={steps}", f"out={out}/runs", f"cache={out}/cache",
    )  # fmt: skip
    with open_root(root) as run:
        with start(build_system(wire(root), run.folder), run) as training:
            try:
                fit(training)
            except Diverged as e:
                print(e)
        rows = run.metrics().values()
    return {name: [row[name] for row in rows if name in row] for name in ("loss", "grad_norm")}


def spikes(values: list[float], factor: float) -> int:
    windows = (values[i - WINDOW : i] for i in range(WINDOW, len(values)))
    pairs = zip(windows, values[WINDOW:], strict=True)
    return sum(value > factor * statistics.median(window) for window, value in pairs)


def summary(run: dict[str, list[float]], steps: int) -> dict[str, Any]:
    loss, last = run["loss"], max(1, steps // 10)
    medians = [statistics.median(loss[i - WINDOW : i]) for i in range(WINDOW, len(loss))]
    worst = max((v / m for v, m in zip(loss[WINDOW:], medians, strict=True)), default=0.0)
    return {
        "steps": len(loss),
        "final loss": statistics.fmean(loss[-last:]),
        "loss spikes": spikes(loss, LOSS_SPIKE),
        "largest rise": worst,
        "gradient spikes": spikes(run["grad_norm"], GRADIENT_SPIKE),
    }


def interval(values: list[float]) -> str:
    """Mean +- half the 95 % interval (Student's t)."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return (
        f"{statistics.fmean(values):.3f} +- {t * statistics.stdev(values) / sqrt(len(values)):.3f}"
    )


def report(found: dict[str, Any]) -> list[str]:
    runs, seeds, steps = found["runs"], range(found["seeds"]), found["steps"]
    names = ("final loss", "loss spikes", "largest rise", "gradient spikes")
    lines = [
        "# Long skips: loss spikes and final loss",
        "",
        f"{(__doc__ or '').splitlines()[0]} Made by `benchmarks/skips_ablation.py`: {steps} steps, "
        f"{len(seeds)} seeds, {found['machine']}.",
        "",
        f"| motion | skips | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for motion, skips in product(MOTION, SKIPS):
        own = [runs[f"{motion}/{skips}/{seed}"] for seed in seeds]
        cells = [interval([run[name] for run in own]) for name in names]
        lines.append(f"| {motion} | {skips} | {' | '.join(cells)} |")
    lines += ["", "With skips minus without, paired by seed (mean and 95 % interval):", ""]
    for motion in MOTION:
        for name in names:
            pairs = [runs[f"{motion}/uvit/{s}"][name] - runs[f"{motion}/none/{s}"][name]
                     for s in seeds]  # fmt: skip
            lines.append(f"- motion {motion}, {name}: {interval(pairs)}")
    if not any(run["loss spikes"] + run["gradient spikes"] for run in runs.values()):
        lines += ["", NO_SPIKES]
    return lines


def draw(curves: dict[str, dict[str, list[float]]], seeds: int, path: Path) -> None:
    """Plots losses by step: a panel for each motion module, with both kinds of skips."""
    from PIL import Image, ImageDraw

    width, height, margin = 620, 320, 44
    sheet = Image.new("RGB", (2 * width, height), "white")
    top = max(min(max(c["loss"]), 3.0) for c in curves.values())
    steps = max(len(c["loss"]) for c in curves.values())
    for panel, motion in enumerate(MOTION):
        pen, left = ImageDraw.Draw(sheet), panel * width + margin
        right, bottom = (panel + 1) * width - 12, height - 30
        pen.rectangle((left, 24, right, bottom), outline="#999999")
        pen.text((left, 6), f"motion_module={motion}: training loss, {seeds} seeds", fill="black")
        for value in (0, top / 2, top):
            y = bottom - value / top * (bottom - 24)
            pen.text((left - 34, y - 6), f"{value:.2f}", fill="#555555")
        for skips, colour in zip(SKIPS, ("#d9822b", "#2b6cb0"), strict=True):
            place = left + 320 + 130 * SKIPS.index(skips)
            pen.text((place, 6), f"skips={skips}", fill=colour)
            for seed in range(seeds):
                loss = curves[f"{motion}/{skips}/{seed}"]["loss"]
                step = (right - left) / max(1, len(loss) - 1)
                points = [(left + i * step, max(24, bottom - v / top * (bottom - 24)))
                          for i, v in enumerate(loss)]  # fmt: skip
                pen.line(points, fill=colour, width=1)
        pen.text((left, bottom + 8), "0", fill="#555555")
        pen.text((right - 60, bottom + 8), f"step {steps}", fill="#555555")
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    kinds = [*product(MOTION, SKIPS, range(args.seeds))]
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as out,
        ProcessPoolExecutor(args.processes, mp_context=spawn) as pool,
    ):
        jobs = {
            f"{motion}/{skips}/{seed}": pool.submit(
                trained, skips, motion, seed, args.steps, Path(out)
            )
            for motion, skips, seed in kinds
        }
        curves = {name: job.result() for name, job in jobs.items()}
    found = {
        "machine": f"{platform.machine()}, one thread, torch {installed('torch')['torch']}",
        "settings": [*COMMON],
        "steps": args.steps,
        "seeds": args.seeds,
        "runs": {name: summary(run, args.steps) for name, run in curves.items()},
        "curves": {k: {n: [round(x, 5) for x in v] for n, v in c.items()}
                   for k, c in curves.items()},
    }  # fmt: skip
    write("skips_ablation", found, report(found), args.to)
    draw(curves, args.seeds, args.to / "skips_ablation.png")


if __name__ == "__main__":
    main()
