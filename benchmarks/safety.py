"""What each safety feature takes of a training step, measured inside one real run.

    python benchmarks/safety.py [--steps 400]

The calls of each feature are timed where they happen in a run of the default system at batch 16 (on
one thread); a row is the sum of them over the run, divided by its steps. Checkpoints are written as
often as in the default recipe. `plain noise` is what torch's global generator takes for the numbers
that the keyed draws give.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch

from sandbox import compose
from sandbox.config.wiring import wire
from sandbox.data.loader import Loader
from sandbox.data.randomness import Keyed
from sandbox.distributed.rank import Rank
from sandbox.runs.run import open_run
from sandbox.storage import checkpoint
from sandbox.training import loop, state
from sandbox.training.build import build_system

RESULTS = Path(__file__).parent / "results"
FEATURES: dict[str, list[tuple[Any, str]]] = {
    "keyed draws: noise, times, dropping": [
        (Keyed, "normal"), (Keyed, "uniform"), (Keyed, "stratified"), (Keyed, "integers")
    ],
    "dropout seeded for each micro-batch": [(state, "seed_dropout"), (state, "seed_of")],
    "ranks agree whether to stop": [(Rank, "agree_to_stop")],
    "metrics kept, checked and written": [
        (state.Training, "note"), (state.Training, "flush")
    ],
    "checkpoint (checked, hashed, synced)": [(checkpoint, "save_and_prune")],
    "order of samples and its state": [(Loader, "state_dict")],
}  # fmt: skip


@contextmanager
def timed(owner: Any, name: str, seconds: Counter, feature: str) -> Iterator[None]:
    """Inside the block every call of `owner.name` adds to `seconds[feature]`."""
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
    seconds: Counter = Counter()
    with tempfile.TemporaryDirectory() as out:
        root = compose(
            "data.batch_size=16", "logger=null", f"steps={args.steps}", "trainer.threads=1",
            f"out={out}", f"cache={RESULTS.parent.parent}/outputs/cache",
        )  # fmt: skip
        wiring = wire(root)
        with open_run(out, "safety", {"bench": 1}) as run, ExitStack() as stack:
            system = build_system(wiring)
            for feature, calls in FEATURES.items():
                for owner, name in calls:
                    stack.enter_context(timed(owner, name, seconds, feature))
            with state.start(system, run, None) as started:
                began = time.perf_counter()
                loop.fit(started)
                whole = time.perf_counter() - began
        latents = wiring.latents[0]
    shape = (16, latents.channels, latents.frames, latents.height, latents.width)
    began = time.perf_counter()
    for _ in range(args.steps):
        torch.randn(shape)
        torch.rand(16)
    plain = time.perf_counter() - began
    rows = {"a step": whole, **{f: seconds[f] for f in FEATURES}, "plain noise": plain}
    rows = {name: 1e3 * s / args.steps for name, s in rows.items()}
    machine = {
        "cpu": platform.machine(), "torch": torch.__version__, "lightning": lightning.__version__
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    found = {"machine": machine, "steps": args.steps, "ms_per_step": rows}
    (RESULTS / "safety.json").write_text(json.dumps(found, indent=1) + "\n")
    table = ["| feature | ms a step | share of the step |", "|---|---|---|"]
    table += [f"| {k} | {v:.3f} | {100 * v / rows['a step']:.1f} % |" for k, v in rows.items()]
    heading = f"# What safety takes of a step\n\nDefault system, batch 16, {args.steps} steps, "
    (RESULTS / "safety.md").write_text(f"{heading}{machine}\n\n" + "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
