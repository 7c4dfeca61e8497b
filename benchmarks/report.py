"""Time to write a report over many runs, by stage.

    python benchmarks/report.py [--runs 1000]

Generated run folders: the full resolved configuration, 200 recorded steps, scores with their
protocols, no samples; settings x 5 seeds. Each stage is timed once, after a warm-up on 10 runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import write

SEEDS, STEPS = 5, 200


def make(folder: Path, count: int) -> None:
    from sandbox import compose
    from sandbox.comparable import protocols
    from sandbox.config import to_container
    from sandbox.contracts import Clip

    root = compose()
    config = to_container(root)
    names = ["colour", "digit", "direction", "shape", "realism", "speed", "diversity"]
    recorded = protocols(root, Clip(3, 9, 16, 16), 192, "ema", names)
    draw = random.Random(0)
    for i in range(count):
        lr, seed = 1e-4 * (1 + i // SEEDS), i % SEEDS
        run = folder / f"default-{i:08x}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"lr": lr, "seed": seed}))
        metrics = {
            "overrides": [f"lr={lr}"],
            "scores": {"model": {name: draw.random() for name in names}},
            "first_stage_psnr_db": 25 + draw.random(),
            "protocols": recorded,
            "cost": {"parameters": 392000, "trained": 392000, "training_seconds": 50.0},
        }
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "environment.json").write_text(json.dumps({"code": {"commit": "0"}}))
        (run / "result.json").write_text(json.dumps({"loss": draw.random()}))
        lines = [
            json.dumps({"step": s, "loss": 1 / s + draw.random() / 10}) for s in range(1, STEPS)
        ]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def timed(folder: Path) -> dict[str, float]:
    """CPU seconds to read, compare and write."""
    from sandbox.ablation import compare
    from sandbox.ablation_page import write_ablation
    from sandbox.ablation_runs import read

    marks = [time.process_time()]
    found = read(folder)
    marks.append(time.process_time())
    ablation = compare(found)
    marks.append(time.process_time())
    write_ablation(folder / "report", ablation)
    marks.append(time.process_time())
    parts = [b - a for a, b in itertools.pairwise(marks)]
    return dict(zip(("read", "compare", "write"), (round(p, 2) for p in parts), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "warm-up"), 10)
        timed(Path(folder, "warm-up"))
        make(Path(folder, "runs"), count)
        parts = timed(Path(folder, "runs"))
    seconds = parts | {"total": round(sum(parts.values()), 2)}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    result = {"runs": count, "variants": count // SEEDS, "cpu_seconds": seconds, **machine}
    lines = [
        f"# A report over {count:,} runs", "",
        f"{count // SEEDS} variants with {SEEDS} seeds, 8 numbers each; CPU time, "
        f"Python {machine['python']}, {machine['machine']}.", "",
        "| part | CPU |", "|---|---|", *(f"| {k} | {v:.2f} s |" for k, v in seconds.items()),
    ]  # fmt: skip
    write("report", result, lines)


if __name__ == "__main__":
    main()
