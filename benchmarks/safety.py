"""Time of each safety feature per training step, measured in one run.

    python benchmarks/safety.py [--steps 400]

Times the calls of each feature during a run of the default system at batch 16 on one thread; a row
is their sum divided by the number of steps. Checkpoints are written as often as in the default
recipe. `plain noise` is the time of PyTorch's global generator for the same random numbers.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import HOME, installed, write
from sandbox import compose
from sandbox.config.wiring import wire
from sandbox.data.loader import Loader
from sandbox.data.randomness import Keyed
from sandbox.distributed.rank import Rank
from sandbox.runs.resume import open_run
from sandbox.storage import checkpoint
from sandbox.training import loop, setup, state
from sandbox.training.build import build_system
from sandbox.training.tracking import MetricBuffer

FEATURES: dict[str, list[tuple[Any, str]]] = {
    "keyed draws: noise, times, dropping": [
        (Keyed, "normal"), (Keyed, "uniform"), (Keyed, "stratified"), (Keyed, "integers")
    ],
    "dropout seeded for each micro-batch": [(loop, "seed_dropout"), (loop, "seed_of")],
    "ranks agree whether to stop": [(Rank, "agree_to_stop")],
    "metrics kept, checked and written": [
        (MetricBuffer, "add"), (state.Training, "flush")
    ],
    "checkpoint (checked, hashed, synced)": [(checkpoint, "save_and_prune")],
    "order of samples and its state": [(Loader, "state_dict")],
}  # fmt: skip


@contextmanager
def timed(owner: Any, name: str, seconds: defaultdict[str, float], feature: str) -> Iterator[None]:
    """Within the block, adds the time of each call of `owner.name` to `seconds[feature]`."""
    call: Callable = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[feature] += time.perf_counter() - began

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    seconds: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as out:
        root = compose(
            "data.batch_size=16", "logger=null", f"steps={args.steps}", "trainer.threads=1",
            f"out={out}", f"cache={HOME}/outputs/cache",
        )  # fmt: skip
        wiring = wire(root)
        with open_run(out, "safety", {"bench": 1}) as run, ExitStack() as stack:
            system = build_system(wiring)
            for feature, calls in FEATURES.items():
                for owner, name in calls:
                    stack.enter_context(timed(owner, name, seconds, feature))
            with setup.start(system, run, None) as started:
                began = time.perf_counter()
                loop.fit(started)
                total = time.perf_counter() - began
        latents = wiring.latents[0]
    shape = (16, latents.channels, latents.frames, latents.height, latents.width)
    began = time.perf_counter()
    for _ in range(args.steps):
        torch.randn(shape)
        torch.rand(16)
    plain = time.perf_counter() - began
    rows = {"a step": total, **{f: seconds[f] for f in FEATURES}, "plain noise": plain}
    rows = {name: 1e3 * s / args.steps for name, s in rows.items()}
    machine = {"cpu": platform.machine()} | installed("torch", "lightning")
    lines = [
        "# Safety features: time per step", "",
        f"Default system, batch 16, {args.steps} steps, {machine}", "",
        "| feature | ms a step | share of the step |", "|---|---|---|",
        *(f"| {k} | {v:.3f} | {100 * v / rows['a step']:.1f} % |" for k, v in rows.items()),
    ]  # fmt: skip
    write("safety", {"machine": machine, "steps": args.steps, "ms_per_step": rows}, lines)


if __name__ == "__main__":
    main()
