"""Overhead of our training step over a bare PyTorch loop with the same model.

    python benchmarks/step_overhead.py    # writes benchmarks/results/step_overhead.{json,md}

Both sides train the same backbone with the same optimizer, gradient clipping and precomputed
batches. The bare loop draws noise and timesteps from PyTorch's global generator and does not log.
Ours is `training.loop.fit`: keyed randomness per sample and name, Lightning, metrics to disk
every 20 steps, checks for non-finite values. Rounds alternate; results are medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, installed, write
from sandbox import compose
from sandbox.config import registry
from sandbox.config.wiring import wire
from sandbox.contracts import Batch, Conditions
from sandbox.data.loader import Loader
from sandbox.runs.resume import open_run
from sandbox.training.build import build_system
from sandbox.training.loop import fit
from sandbox.training.setup import start

CASES = {  # name: overrides
    "default DiT, batch 16": ["data.batch_size=16"],
    "default DiT, batch 32": [],
    "DiT d=192, 6 blocks, batch 16": [
        "data.batch_size=16",
        "backbone.width=192",
        "backbone.num_blocks=6",
        "backbone.num_heads=3",
        "conditioning.width=192",
    ],
}
BATCHES = 8  # precomputed, used in turn


def bare_loop(overrides: list[str], steps: int) -> float:
    """Seconds per step of a bare loop: encode, noise, forward, loss, backward, clip, step."""
    root = compose("logger=null", "ema=none", f"steps={steps}", *overrides)
    system = build_system(wire(root)).train()
    items = registry.create(root.data).split("train")
    loaded = list(islice(Loader(items, root.data.batch_size, 0), BATCHES))
    backbone, conditioner, first_stage = system.backbone, system.conditioner, system.first_stage
    parameters = [p for p in system.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=root.lr, betas=(0.9, 0.95), fused=True)
    rows = [conditioner.rows(b.captions) for b in loaded]

    def step(batch: Batch, row: Tensor) -> None:
        with torch.no_grad():
            z0 = first_stage.scaled(first_stage.encode(batch.video).mean)
        t = torch.sigmoid(1 + torch.randn(len(z0)))
        eps = torch.randn_like(z0)
        z_t = torch.lerp(z0, eps, t.view(-1, 1, 1, 1, 1))
        kept = torch.where(torch.rand(len(z0), 1) < 0.1, 0, row)
        out = backbone(z_t, t * 1000, Conditions(vector=conditioner.table(kept).sum(1)))
        loss = torch.nn.functional.mse_loss(out, eps - z0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    source = cycle(zip(loaded, rows, strict=True))
    for batch, row in islice(source, 10):
        step(batch, row)
    started = time.perf_counter()
    for batch, row in islice(source, steps):
        step(batch, row)
    return (time.perf_counter() - started) / steps


class Clock(Callback):
    """Records when each micro-batch ends."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(self.now())


def our_loop(overrides: list[str], steps: int) -> float:
    """Seconds per step of `fit`, from the 10th to the last step."""
    ends = ends_of_steps(overrides, steps)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def ends_of_steps(
    overrides: list[str],
    steps: int,
    logger: str = "logger=null",
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Start times of `steps` steps of `fit`, from the 10th on, and the end of the last one.

    The final checkpoint is not included.
    """
    with tempfile.TemporaryDirectory() as out:
        total = steps + 11
        root = compose(
            logger, "ema=none", f"steps={total}", f"trainer.repeat={BATCHES}",
            "checkpoint.every=1000000", f"out={out}",
            f"trainer.threads={torch.get_num_threads()}",
            f"cache={HOME}/outputs/cache", *overrides,
        )  # fmt: skip
        wiring = wire(root)
        with open_run(root.out, "benchmark", {}, "never") as run:
            with start(build_system(wiring, run.folder), run) as training:
                clock = Clock(now)
                fit(training, [clock])
            return clock.ends[9:-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, overrides in CASES.items():
        pairs = [
            (bare_loop(overrides, args.steps), our_loop(overrides, args.steps))
            for _ in range(args.rounds)
        ]
        bare, ours = (1000 * statistics.median(side) for side in zip(*pairs, strict=True))
        extra = 1000 * statistics.median(b - a for a, b in pairs)
        ratio = ours / bare
        rows.append({"case": name, "bare_ms": bare, "ours_ms": ours, "extra_ms": extra,
                     "ratio": ratio, "pairs_s": pairs})  # fmt: skip
        print(f"{name}: bare {bare:.2f} ms, ours {ours:.2f} ms, {extra:+.2f} ms", flush=True)
    cpu = platform.processor() or platform.machine()
    machine = {"cpu": cpu, "threads": args.threads} | installed("torch", "lightning")
    lines = [
        "# Training step over a bare loop", "",
        f"{args.rounds} rounds of {args.steps} steps, {machine}", "",
        "| model | bare loop | ours | extra | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {r['case']} | {r['bare_ms']:.2f} ms | {r['ours_ms']:.2f} ms | {r['extra_ms']:+.2f} ms "
        f"| {r['ratio']:.3f} |"
        for r in rows
    ]
    write("step_overhead", {"machine": machine, "rows": rows}, lines)


if __name__ == "__main__":
    main()
