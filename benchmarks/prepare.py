"""Throughput of task=prepare, its time by stage, and its memory over time.

    python benchmarks/prepare.py [--clips 1000] [--seconds 4] [--fps 24] [--width 320] [--workers 2]

Generated clips (5:3, h264): one in ten without motion, one in ten with text, one in ten a copy. All
default stages, then shards. Memory of the command and of its largest worker is read from /proc four
times per second.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, write
from benchmarks.multirun import rss
from sandbox.reports.media import write_frames
from tests.raw_videos import scene, written

SPEED = 9.6  # pixels per second of moving clips
SAMPLES = 40  # memory samples in the JSON file
PARTS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the run time, with memory in the table


def generate(folder: Path, kind: argparse.Namespace) -> None:
    for i in range(kind.clips):
        path, part = folder / f"{i // 100:03}" / f"{i:06}.mp4", i % 10
        if part == 9:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{(i - 9) // 100:03}" / f"{i - 9:06}.mp4", path)
            continue
        speed = (0.0 if part == 8 else SPEED / kind.fps, 0.0)
        frames = scene(i, kind.seconds, speed, kind.width * 3 // 5, kind.width, kind.fps)
        shown = written(frames, "BREAKING NEWS", kind.width / 320) if part == 7 else frames
        write_frames(path, shown, kind.fps, crf=23, preset="veryfast")


def workers_of(pid: int) -> list[int]:
    try:
        return [int(k) for k in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def prepare(raw: Path, to: Path, workers: int) -> tuple[float, list[dict[str, float]]]:
    """Seconds, and memory samples in MiB with their time."""
    words = [f"data_root={raw}", f"to={to}", f"workers={workers}", "sheet=6"]
    started, memory = time.monotonic(), []
    child = subprocess.Popen([sys.executable, "run.py", "task=prepare", *words], cwd=HOME)
    while child.poll() is None:
        largest = max((rss(pid) for pid in workers_of(child.pid)), default=0.0)
        now = {"seconds": time.monotonic() - started, "command": rss(child.pid), "worker": largest}
        memory.append({k: round(v, 1) for k, v in now.items()})
        time.sleep(0.25)
    if child.returncode:
        raise SystemExit(f"task=prepare ended with {child.returncode}")
    return time.monotonic() - started, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--fps", type=float, default=24.0)
    parser.add_argument("--width", type=int, default=320)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, to = Path(folder) / "raw", Path(folder) / "to"
        generate(raw, args)
        seconds, memory = prepare(raw, to, args.workers)
        summary = json.loads((to / "summary.json").read_text())
    del summary["folder"]
    machine = {"cpu": platform.machine(), "python": platform.python_version()}
    found = {"machine": machine, **vars(args),
             "took_seconds": round(seconds, 1), "summary": summary,
             "memory_mib": memory[:: len(memory) // SAMPLES + 1]}  # fmt: skip
    total = sum(summary["core_seconds"].values())
    lines = [
        f"# {args.clips} clips prepared by {args.workers} workers", "",
        f"{machine}; clips of {args.seconds:g} s, {args.width} pixels wide, {args.fps:g} fps", "",
        f"{seconds:.0f} s; {summary['hours']['found']:.3f} h of video, "
        f"{summary['hours_per_core_hour']} h of video per core hour; kept {summary['kept']}, "
        f"dropped {summary['dropped']}", "", "| CPU seconds | | |", "|---|---|---|",
        *(f"| {k} | {v:.1f} | {100 * v / total:.0f} % |"
          for k, v in summary["core_seconds"].items()),
        "", "| memory after | command | largest worker |", "|---|---|---|",
    ]  # fmt: skip
    for part in PARTS:
        now = memory[int(part * (len(memory) - 1))]
        row = (f"{now[k]:.0f}" for k in ("seconds", "command", "worker"))
        lines.append("| {} s | {} MiB | {} MiB |".format(*row))
    write("prepare", found, lines)


if __name__ == "__main__":
    main()
