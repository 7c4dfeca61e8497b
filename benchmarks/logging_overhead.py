"""Overhead of each logger on a training step.

    python benchmarks/logging_overhead.py    # writes benchmarks/results/logging_overhead.{json,md}

In all cases the run writes every step to its metrics.jsonl. `trainer.log_every` sets how often the
collected metrics go to the logger: every 20 steps (default) or every step (worst case). Times are
CPU time of the training process, which depends little on other load. W&B runs offline, in a
separate process that is not counted. The system is a tiny variant of the default one, so that the
overhead is a large part of a step. Rounds alternate; the result is the fastest block of 20 steps,
because other load can only slow a block down.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, installed, write
from benchmarks.step_overhead import ends_of_steps

LOGGERS = {
    "none": "logger=null",
    "csv": "logger=csv",
    "W&B, offline": "logger=wandb_offline",
}
EVERY = (20, 1)  # steps between writes to the logger
BLOCK = 20  # steps
SMALL = ("data.batch_size=2", "backbone.width=32", "backbone.num_blocks=1", "conditioning.width=32")


def rows(steps: int, rounds: int, *overrides: str) -> list[dict]:
    """A row for each logger and interval; the first has no logger."""
    found = []
    for every in EVERY:
        seconds: dict[str, list[float]] = {name: [] for name in LOGGERS}
        for _ in range(rounds):
            for name, logger in LOGGERS.items():
                settings = [f"trainer.log_every={every}", *SMALL, *overrides]
                ends = ends_of_steps(settings, steps, logger, time.process_time)[::BLOCK]
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
            print(f"{name}, every {every}: {found[-1]['ms']:.2f} ms per step", flush=True)
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
    cpu = platform.processor() or platform.machine()
    machine = {"cpu": cpu, "threads": args.threads} | installed("torch")
    lines = [
        "# Logging: CPU time of a step", "",
        f"{args.rounds} rounds of {args.steps} steps, {machine}", "",
        "| logger | log_every | a step | extra | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['logger']} | {r['log_every']} steps | {r['ms']:.2f} ms | {r['extra_ms']:+.2f} ms "
        f"| {r['ratio']:.3f} |"
        for r in found
    ]
    write("logging_overhead", {"machine": machine, "rows": found}, lines, args.out)


if __name__ == "__main__":
    main()
