"""A checkpoint of 100 MB, as the sandbox writes and reads it, beside plain torch.save in one run.

    python benchmarks/checkpoint.py [--rounds 7] [--megabytes 100]

Ways take turns, so that what else the machine does falls on all of them alike; a row is the median
of the rounds. `fsync` is there because plain torch.save returns before anything is on the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sandbox.storage import checkpoint

RESULTS = Path(__file__).parent / "results"


def state(megabytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, average and both moments of AdamW, in tensors of 4 MB."""
    count = max(1, megabytes // 16)
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    return {kind: {f"{i}": torch.randn(1 << 20) for i in range(count)} for kind in kinds}


def plain(state: dict, folder: Path) -> None:
    torch.save(state, folder / "plain.ckpt")


def plain_and_fsync(state: dict, folder: Path) -> None:
    with (folder / "plain.ckpt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def ours(state: dict, folder: Path) -> None:
    checkpoint.save(folder / "ours", state, 1)


def plain_load(state: dict, folder: Path) -> None:
    torch.load(folder / "plain.ckpt", weights_only=True)


def our_load(state: dict, folder: Path) -> None:
    checkpoint.load(checkpoint.checkpoints(folder / "ours")[-1])


def hash_alone(state: dict, folder: Path) -> None:
    hashed = hashlib.sha256()
    for kind in state.values():
        for tensor in kind.values():
            hashed.update(tensor.numpy())


WAYS: dict[str, Callable[[dict, Path], None]] = {
    "torch.save": plain,
    "torch.save and fsync": plain_and_fsync,
    "sandbox: checked, hashed, synced, renamed, manifest": ours,
    "torch.load": plain_load,
    "sandbox: verified and loaded": our_load,
    "SHA-256 of the tensors alone": hash_alone,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made, times = state(args.megabytes), {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as where:
        folder = Path(where)
        for _ in range(args.rounds):
            for name, way in WAYS.items():
                began = time.perf_counter()
                way(made, folder)
                times[name].append(time.perf_counter() - began)
    base = {"save": "torch.save", "load": "torch.load"}
    rows = []
    for name, seconds in times.items():
        against = base["load" if "load" in name else "save"]
        ratio = statistics.median(seconds) / statistics.median(times[against])
        rows.append({"way": name, "ms": 1e3 * statistics.median(seconds), "ratio": ratio})
    versions = {
        "cpu": platform.machine(), "torch": torch.__version__, "python": platform.python_version()
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": versions, "megabytes": args.megabytes, "rounds": args.rounds, "rows": rows}
    (RESULTS / "checkpoint.json").write_text(json.dumps(found, indent=1) + "\n")
    table = ["| way | median | ratio to torch's |", "|---|---|---|"]
    table += [f"| {r['way']} | {r['ms']:.0f} ms | {r['ratio']:.2f} |" for r in rows]
    heading = f"# A checkpoint of {args.megabytes} MB\n\n{args.rounds} rounds, {versions}\n\n"
    (RESULTS / "checkpoint.md").write_text(heading + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
