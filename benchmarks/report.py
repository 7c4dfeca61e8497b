"""How long a report over many runs takes, and what of it.

    python benchmarks/report.py [--runs 1000]

Run folders are made as runs leave them: the whole resolved configuration, 200 recorded steps,
scores with their protocols, no samples; settings x 5 seeds. Each part is timed once, after a
warm-up on 10 runs: a report is written once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import tempfile
import time
from pathlib import Path

import yaml

RESULTS = Path(__file__).parent / "results"
SEEDS, STEPS = 5, 200


def make(folder: Path, count: int) -> None:
    from sandbox import compose
    from sandbox.config.root import to_container
    from sandbox.contracts import Clip
    from sandbox.runs.protocol import protocols

    root = compose()
    config = to_container(root)
    names = ["colour", "digit", "direction", "shape", "realism", "speed", "diversity"]
    said = protocols(root, Clip(3, 9, 16, 16), 192, "ema", names)
    draw = random.Random(0)
    for i in range(count):
        rate, seed = 1e-4 * (1 + i // SEEDS), i % SEEDS
        run = folder / f"default-{i:08x}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"lr": rate, "seed": seed}))
        metrics = {
            "overrides": [f"lr={rate}"],
            "scores": {"model": {name: draw.random() for name in names}},
            "first_stage_psnr_db": 25 + draw.random(),
            "protocols": said,
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
    """CPU seconds of reading, comparing and writing."""
    from sandbox.reports.ablation import compare
    from sandbox.reports.ablation_page import write_ablation
    from sandbox.reports.ablation_runs import read

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
        for name, runs in (("warm", 10), ("many", count)):
            make(Path(folder, name), runs)
            parts = timed(Path(folder, name))
    result = {
        "runs": count,
        "variants": count // SEEDS,
        "cpu_seconds": parts | {"total": round(sum(parts.values()), 2)},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    (RESULTS / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = "\n".join(f"| {k} | {v:.2f} s |" for k, v in result["cpu_seconds"].items())
    text = (
        f"# A report over {count:,} runs\n\n{result['variants']} variants with {SEEDS} seeds, "
        f"8 numbers each; CPU time, Python {result['python']}, {result['machine']}.\n\n"
        f"| part | CPU |\n|---|---|\n{rows}\n"
    )
    (RESULTS / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
