"""Overhead of a multirun job, and memory over twenty jobs.

    python benchmarks/multirun.py [--jobs 20]

Runs one tiny configuration (one step, one clip) in three ways: as jobs of a multirun; repeatedly in
one warm process (the job's own work); and as an empty function in a rank that the supervisor starts
(a warm start). The overhead is the job time minus the other two: composing, checks, folders, logs.
Differences between jobs exclude imports. Memory of the command and of the server that forks the
ranks is read after each job.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, write

SMALL = [
    "vae.fit_clips=16", "backbone.width=8", "backbone.num_blocks=1", "backbone.num_heads=2",
    "conditioning.width=8", "conditioning.buckets=32", "data.batch_size=2", "steps=1",
    "sampler.steps=1", "task.score_clips=2", "task.samples=1", "task.untrained=false",
    "logger=null", "resume=never", "trainer.threads=1",
]  # fmt: skip
WARM = """
import sys, time
from sandbox import compose, train
jobs, *words = sys.argv[1:]
for seed in range(int(jobs)):
    started = time.perf_counter()
    train(compose(*words, f"seed={seed}"))
    print("JOB", time.perf_counter() - started, flush=True)
"""
EMPTY = """
import sys, time
from sandbox.launch import launch
for _ in range(int(sys.argv[1])):
    started = time.perf_counter()
    launch("benchmarks.multirun:nothing", {})
    print("JOB", time.perf_counter() - started, flush=True)
"""


def nothing(settings: dict, rank: object) -> dict:
    """The empty function that a rank runs."""
    return {}


def median_job(code: str, *words: str) -> float:
    """Median seconds per job in a separate process, without the first job, which imports."""
    found = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=HOME, text=True, capture_output=True, check=False
    )
    times = [float(x.split()[1]) for x in found.stdout.splitlines() if x.startswith("JOB")]
    if found.returncode or len(times) < 3:
        raise SystemExit(found.stderr[-2000:])
    return statistics.median(times[1:])


def multirun(jobs: int, out: str, words: list[str]) -> tuple[float, list[dict[str, float]]]:
    """Median seconds between the ends of two jobs, and memory in MiB after each job."""
    seeds = ",".join(map(str, range(jobs)))
    child = subprocess.Popen(
        [sys.executable, "run.py", *words, "-m", f"seed={seeds}"],
        cwd=HOME,
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
        raise SystemExit(f"{len(ends)} of {jobs} jobs ended; exit code {child.returncode}")
    gaps = [b - a for a, b in pairwise(ends)]
    return statistics.median(gaps), memory


def resident(pid: int) -> dict[str, float]:
    """MiB of the command and of its largest child process, the server with the imports."""
    kids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"command": rss(pid), "server": max((rss(int(k)) for k in kids), default=0.0)}


def rss(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # the process has just ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        words = [*SMALL, f"out={out}", f"cache={out}/cache"]
        job, memory = multirun(args.jobs, out, words)
    with tempfile.TemporaryDirectory() as out:
        words = [*SMALL, f"out={out}", f"cache={out}/cache"]
        work = median_job(WARM, str(args.jobs), *words)
    start = median_job(EMPTY, str(args.jobs))
    rows = {
        "a job of the multirun": job,
        "its own work, in a warm process": work,
        "warm start of a rank": start,
        "overhead": job - work - start,
    }
    machine = {"cpu": platform.machine(), "python": platform.python_version()}
    lines = [f"# A multirun of {args.jobs} jobs", "", str(machine), "",
             "| | per job | ratio to its own work |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {k} | {1e3 * v:.0f} ms | {v / work:.2f} |" for k, v in rows.items()]
    lines += ["", "| memory after | command | server of the ranks |", "|---|---|---|"]
    for n in sorted({0, 4, len(memory) // 2, len(memory) - 1}):
        m = memory[n]
        lines.append(f"| job {n + 1} | {m['command']:.0f} MiB | {m['server']:.0f} MiB |")
    result = {"machine": machine, "jobs": args.jobs, "seconds": rows, "memory_mib": memory}
    write("multirun", result, lines)


if __name__ == "__main__":
    main()
