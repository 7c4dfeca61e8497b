"""What each logger adds to a training step, beside the same step without one.

    python benchmarks/logging_overhead.py         # writes
    benchmarks/results/logging_overhead.{json,md}

Every step is measured and written to the run's own metrics.jsonl in all cases; `trainer.log_every`
says how often what has gathered goes out (20 steps by default, and each step as the worst case).
Seconds are CPU time of the process that trains, which a busy machine changes little; W&B records
offline, in a process of its own that is not in it. The system is the default one in small, so that
a step is short beside what is looked for. Rounds alternate; what counts is the fastest block of 20
steps, as another tenant of the machine can only make one slower.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

sys.path[:1] = [str(Path(__file__).resolve().parent.parent)]
from benchmarks.step_overhead import ends_of_steps  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LOGGERS = {
    "none": "logger=null",
    "csv": "logger=csv",
    "W&B, offline": "logger.mode=offline",
}
EVERY = (20, 1)  # steps between two times that metrics go out
BLOCK = 20  # steps
SMALL = ("data.batch_size=2", "backbone.width=32", "backbone.num_blocks=1", "conditioning.width=32")


def rows(steps: int, rounds: int, *overrides: str) -> list[dict]:
    """A row for each logger and interval, the one without a logger first."""
    found = []
    for every in EVERY:
        seconds: dict[str, list[float]] = {name: [] for name in LOGGERS}
        for _ in range(rounds):
            for name, logger in LOGGERS.items():
                words = [f"trainer.log_every={every}", *SMALL, *overrides]
                ends = ends_of_steps(words, steps, logger, time.process_time)[::BLOCK]
                seconds[name] += [(b - a) / BLOCK for a, b in pairwise(ends)]
        none = min(seconds["none"])
        for name, own in seconds.items():
            found.append({
                "logger": name,
                "log_every": every,
                "ms": 1000 * min(own),
                "extra_ms": 1000 * (min(own) - none),
                "ratio": min(own) / none,
                "blocks_s": own,
            })  # fmt: skip
            print(f"{name}, every {every}: {found[-1]['ms']:.2f} ms a step", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = rows(args.steps, args.rounds)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    args.out.mkdir(exist_ok=True)
    told = json.dumps({"machine": machine, "rows": found}, indent=1)
    (args.out / "logging_overhead.json").write_text(told + "\n")
    table = ["| logger | goes out every | a step | extra | ratio |", "|---|---|---|---|---|"]
    table += [
        f"| {r['logger']} | {r['log_every']} steps | {r['ms']:.2f} ms | {r['extra_ms']:+.2f} ms "
        f"| {r['ratio']:.3f} |"
        for r in found
    ]
    rounds = f"{args.rounds} rounds of {args.steps} steps, {machine}"
    heading = f"# Logging: CPU time of a step\n\n{rounds}\n\n"
    (args.out / "logging_overhead.md").write_text(heading + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
