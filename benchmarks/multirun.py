"""What a job of a multirun costs beside its own work, and memory over twenty jobs.

    python benchmarks/multirun.py [--jobs 20]

One small configuration (a step, a clip) three ways, in one run on one machine: as jobs of a
multirun; again and again in one warm process (the job's own work); and an empty function in a rank
that the supervisor starts (a warm start). What a job of the multirun takes beyond the other two is
its overhead: composing, checking, folders, words. Slopes over jobs leave out imports. Memory is
read after each job: of the command, of the server that ranks are forked from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CHECKOUT = Path(__file__).resolve().parents[1]
SMALL = [
    "vae.fit_clips=16", "backbone.width=8", "backbone.num_blocks=1", "backbone.num_heads=2",
    "conditioning.width=8", "conditioning.buckets=32", "data.batch_size=2", "steps=1",
    "sampler.steps=1", "task.score_clips=2", "task.samples=1", "task.untrained=false",
    "logger=null", "resume=never", "trainer.threads=1",
]  # fmt: skip
WARM = """
import sys, time
from dataclasses import replace
from sandbox import compose, train
from sandbox.config import expand
jobs, *words = sys.argv[1:]
for seed in range(int(jobs)):
    began = time.perf_counter()
    train(compose(*words, f"seed={seed}"))
    print("JOB", time.perf_counter() - began, flush=True)
"""
EMPTY = """
import sys, time
from sandbox.launch import launch
for _ in range(int(sys.argv[1])):
    began = time.perf_counter()
    launch("benchmarks.multirun:nothing", {})
    print("JOB", time.perf_counter() - began, flush=True)
"""


def nothing(settings: dict, rank: object) -> dict:
    """What a rank does that does nothing."""
    return {}


def said(code: str, *words: str) -> float:
    """Median seconds of a job in a process of its own, without the first, which imports."""
    found = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=CHECKOUT, text=True, capture_output=True
    )
    times = [float(x.split()[1]) for x in found.stdout.splitlines() if x.startswith("JOB")]
    if found.returncode or len(times) < 3:
        raise SystemExit(found.stderr[-2000:])
    return statistics.median(times[1:])


def swept(jobs: int, out: str, words: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Seconds between the ends of two jobs (median), and memory in MiB after each job."""
    seeds = ",".join(map(str, range(jobs)))
    child = subprocess.Popen(
        [sys.executable, "run.py", *words, "-m", f"seed={seeds}"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
    )
    ends: list[float] = []
    memory: list[dict[str, float]] = []
    while child.poll() is None:
        if len(list(Path(out).glob("sweeps/*/job-*.json"))) > len(ends):
            ends.append(time.perf_counter())
            memory.append(resident(child.pid))
        time.sleep(0.005)
    if child.returncode or len(ends) != jobs:
        raise SystemExit(f"{len(ends)} of {jobs} jobs were seen to end; exit {child.returncode}")
    gaps = [b - a for a, b in pairwise(ends)]
    return statistics.median(gaps), memory


def resident(pid: int) -> dict[str, float]:
    """MiB of the command and of its largest child, the server that holds the imports."""
    kids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"command": rss(pid), "server": max((rss(int(k)) for k in kids), default=0.0)}


def rss(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it has just ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        words = [*SMALL, f"out={out}", f"cache={out}/cache"]
        whole, memory = swept(args.jobs, out, words)
    with tempfile.TemporaryDirectory() as out:
        words = [*SMALL, f"out={out}", f"cache={out}/cache"]
        work = said(WARM, str(args.jobs), *words)
    start = said(EMPTY, str(args.jobs))
    rows = {
        "a job of the multirun": whole,
        "its own work, in a warm process": work,
        "warm start of a rank": start,
        "overhead": whole - work - start,
    }
    machine = {"cpu": platform.machine(), "python": platform.python_version()}
    found = {"machine": machine, "jobs": args.jobs, "seconds": rows, "memory_mib": memory}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "multirun.json").write_text(json.dumps(found, indent=1) + "\n")
    table = ["| | per job | ratio to its own work |", "|---|---|---|"]
    table += [f"| {k} | {1e3 * v:.0f} ms | {v / work:.2f} |" for k, v in rows.items()]
    table += ["", "| memory after | command | server of the ranks |", "|---|---|---|"]
    for n in sorted({0, 4, len(memory) // 2, len(memory) - 1}):
        m = memory[n]
        table.append(f"| job {n + 1} | {m['command']:.0f} MiB | {m['server']:.0f} MiB |")
    heading = f"# A multirun of {args.jobs} jobs\n\n{machine}\n\n"
    (RESULTS / "multirun.md").write_text(heading + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
