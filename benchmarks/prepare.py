"""How fast task=prepare is, where its time goes, and whether its memory grows.

    python benchmarks/prepare.py [--clips 1000] [--workers 2]

Generated clips of 4 s (320x192, 24 fps, h264), one in ten still, one in ten with writing, one in
ten a copy; all default stages, shards at the end. Memory is that of the command and of its largest
worker, read from /proc four times a second.
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

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.multirun import rss  # noqa: E402
from tests.footage import scene, write, written  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SIZE = {"height": 192, "width": 320, "fps": 24.0}
SECONDS = 4
SHOWN = 40  # of the memory samples, those that the JSON file has


def generate(folder: Path, clips: int) -> None:
    for i in range(clips):
        path, kind = folder / f"{i // 100:03}" / f"{i:06}.mp4", i % 10
        if kind == 9:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{(i - 9) // 100:03}" / f"{i - 9:06}.mp4", path)
            continue
        frames = scene(i, SECONDS, (0.0 if kind == 8 else 0.4, 0.0), **SIZE)
        write(path, written(frames, "BREAKING NEWS") if kind == 7 else frames, SIZE["fps"], crf=23)


def workers_of(pid: int) -> list[int]:
    try:
        return [int(k) for k in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def prepare(raw: Path, to: Path, workers: int) -> tuple[float, list[dict[str, float]]]:
    """Seconds, and memory in MiB with the time and the clips whose scores are in the journal."""
    words = [f"data_root={raw}", f"to={to}", f"workers={workers}", "sheet=6"]
    began, memory = time.monotonic(), []
    child = subprocess.Popen([sys.executable, "run.py", "task=prepare", *words], cwd=CHECKOUT)
    while child.poll() is None:
        largest = max((rss(pid) for pid in workers_of(child.pid)), default=0.0)
        now = {"seconds": time.monotonic() - began, "command": rss(child.pid), "worker": largest}
        memory.append({k: round(v, 1) for k, v in now.items()})
        time.sleep(0.25)
    if child.returncode:
        raise SystemExit(f"task=prepare ended with {child.returncode}")
    return time.monotonic() - began, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw, to = Path(folder) / "raw", Path(folder) / "to"
        generate(raw, args.clips)
        seconds, memory = prepare(raw, to, args.workers)
        summary = json.loads((to / "summary.json").read_text())
    del summary["folder"]
    machine = {"cpu": platform.machine(), "python": platform.python_version()}
    found = {"machine": machine, "clips": args.clips, "workers": args.workers,
             "seconds": round(seconds, 1), "summary": summary,
             "memory_mib": memory[:: len(memory) // SHOWN + 1]}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prepare.json").write_text(json.dumps(found, indent=1) + "\n")
    total = sum(summary["core_seconds"].values())
    lines = [
        f"# {args.clips} clips prepared by {args.workers} workers", "", str(machine), "",
        f"{seconds:.0f} s; {summary['hours']['found']:.3f} h of video, "
        f"{summary['hours_per_core_hour']} h of video per core hour; kept {summary['kept']}, "
        f"dropped {summary['dropped']}", "", "| CPU seconds | | |", "|---|---|---|",
        *(f"| {k} | {v:.1f} | {100 * v / total:.0f} % |"
          for k, v in summary["core_seconds"].items()),
        "", "| memory after | command | largest worker |", "|---|---|---|",
    ]  # fmt: skip
    for part in (0.25, 0.5, 0.75, 0.95):
        now = memory[int(part * (len(memory) - 1))]
        row = (f"{now[k]:.0f}" for k in ("seconds", "command", "worker"))
        lines.append("| {} s | {} MiB | {} MiB |".format(*row))
    (RESULTS / "prepare.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
