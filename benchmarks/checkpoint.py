"""Writing and reading a 100 MB checkpoint, against torch.save and torch.load.

    python benchmarks/checkpoint.py [--rounds 7] [--megabytes 100]

Each round runs all variants in turn, so that other load affects all of them; a row is the median of
the rounds, which run forward and backward (A-B-B-A). `fsync` is included because torch.save returns
before the data is on disk. The stall of a training step is the copy and the start of the thread;
the write that follows is not timed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, installed, write
from sandbox.storage import checkpoint
from sandbox.storage.background import BackgroundWriter, copied_state


def state(megabytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, EMA and both AdamW moments, in tensors of 4 MB."""
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


def copy_alone(state: dict, folder: Path) -> None:
    {kind: {k: v.clone() for k, v in of.items()} for kind, of in state.items()}


def stall(state: dict, folder: Path) -> None:
    copied = copied_state(state)
    WRITER.start(lambda: checkpoint.save(folder / "ours", copied, 1))


def plain_load(state: dict, folder: Path) -> None:
    torch.load(folder / "plain.ckpt", weights_only=True)


def plain_load_and_hash(state: dict, folder: Path) -> None:
    hashlib.sha256((folder / "plain.ckpt").read_bytes()).hexdigest()
    plain_load(state, folder)


def our_load(state: dict, folder: Path) -> None:
    checkpoint.load(checkpoint.checkpoints(folder / "ours")[-1])


def hash_alone(state: dict, folder: Path) -> None:
    hashed = hashlib.sha256()
    for kind in state.values():
        for tensor in kind.values():
            hashed.update(tensor.numpy())


WRITER = BackgroundWriter()
COPIES = ("copy of the tensors", "sandbox: stall, written in a thread")
LIMITS = {"stall": 1.2, "load": 1.2}  # times the copy, times torch.load
VARIANTS: dict[str, Callable[[dict, Path], None]] = {
    "torch.save": plain,
    "torch.save and fsync": plain_and_fsync,
    "sandbox: checked, hashed, synced, renamed, manifest": ours,
    "copy of the tensors": copy_alone,
    "sandbox: stall, written in a thread": stall,
    "torch.load": plain_load,
    "SHA-256 of the file, then torch.load": plain_load_and_hash,
    "sandbox: verified and loaded": our_load,
    "SHA-256 of the tensors alone": hash_alone,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors, times = state(args.megabytes), {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(dir=HOME / "benchmarks") as where:
        folder = Path(where)
        ours(tensors, folder)  # the first round also loads
        plain(tensors, folder)
        for round_ in range(args.rounds):
            order = list(VARIANTS.items())
            for name, run in order[:: -1 if round_ % 2 else 1]:
                started = time.perf_counter()
                run(tensors, folder)
                times[name].append(time.perf_counter() - started)
                WRITER.wait()
    base = {
        "save": "torch.save",
        "load": "torch.load",
        "stall": COPIES[0],
    }
    rows = []
    for name, seconds in times.items():
        kind = "load" if "load" in name else "stall" if name in COPIES else "save"
        against = base[kind]
        ratio = statistics.median(seconds) / statistics.median(times[against])
        rows.append({"way": name, "ms": 1e3 * statistics.median(seconds), "ratio": ratio})
    machine = {"cpu": platform.machine()} | installed("torch")
    lines = [f"# A checkpoint of {args.megabytes} MB", "", f"{args.rounds} rounds, {machine}", "",
             "| way | median | ratio to torch's, or to the copy |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {r['way']} | {r['ms']:.0f} ms | {r['ratio']:.2f} |" for r in rows]
    lines += [
        "",
        f"Wanted: at most {LIMITS['stall']} times the copy, {LIMITS['load']} times torch.load.",
    ]
    sizes = {"megabytes": args.megabytes, "rounds": args.rounds}
    write("checkpoint", {"machine": machine, **sizes, "rows": rows}, lines)


if __name__ == "__main__":
    main()
