"""Real training steps of the full-size recipes on this machine's GPU: time, memory, and on what.

    python benchmarks/gpu_training_steps.py                            # every system below
    python benchmarks/gpu_training_steps.py dynamicrafter_512          # those that are named
    python benchmarks/gpu_training_steps.py --tiny ldm_celebahq_vq4    # its tiny sibling, on a CPU

Weights are random and clips are generated, at the published sizes. The steps are those of
`sandbox.fitting.fit`: frozen encoders, first stage, noise, loss, backward, optimizer, average.
One step warms up, three are measured, one more is looked at by torch's profiler. A case that does
not fit is a row that says so. Writes benchmarks/results/training_steps.{json,md}.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

from sandbox import compose, weight_files  # noqa: E402 (the checkout, from wherever this is started)
from sandbox.config import Root  # noqa: E402
from sandbox.fitting import fit  # noqa: E402
from sandbox.module import Trainable  # noqa: E402
from sandbox.runs import open_run  # noqa: E402
from sandbox.systems import build_system, clips_per_step  # noqa: E402
from sandbox.tasks.train_vae import build_autoencoding  # noqa: E402
from sandbox.training import Training, start  # noqa: E402
from sandbox.wiring import wire  # noqa: E402

RESULTS = HOME / "benchmarks" / "results"
WARM, MEASURED = 1, 3  # optimizer steps
GIB = 2**30
TOP = 12  # operations of a row
EVERYWHERE = (
    "callbacks=[]", "logger=null", "checkpoint.best=0", "checkpoint.weights_every=0",
    "vae.weights=null", "trainer.repeat=1", "data.num_workers=0",
)  # fmt: skip
KINDS = {  # of operations, by parts of their names; the first that fits counts
    "attention": ("attention", "flash"),
    "convolution": ("conv",),
    "matrix products": ("mm", "linear", "matmul"),
    "norms": ("norm",),
    "optimizer and average": ("foreach", "adam", "lerp"),
    "copies": ("copy", "cat", "clone", "contiguous", "memcpy", "memset", "fill", "zero"),
}


@dataclass(frozen=True)
class System:
    """How a recipe is measured: clips of its published size, and its cases by name."""

    clips: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]  # settings that are changed
    random: tuple[str, ...] = ()  # what else would be read from files


FACES = ("data=moving_digits_still", "data.height=256", "data.width=256")
CLIPS = ("data=moving_digits_rates", "data.frames=16", "data.speed=1", "data.random_speed=false")
ONE_DEVICE = ("trainer=single", "trainer.accumulate=2", "trainer.clip=0.5")  # 1 of the 8
CRAFTER = {
    "as published on each device: fp16, two micro-batches": ONE_DEVICE,
    "bf16, two micro-batches": (*ONE_DEVICE, "precision=bf16"),
    "for 24 GB: bf16, LoRA of rank 64, one clip": (
        *ONE_DEVICE, "precision=bf16", "adapter=lora", "adapter.rank=64", "data.batch_size=1",
    ),
}  # fmt: skip
FROM_NOTHING = ("init_from=null", "conditioning.weights=random")
SMALL, LARGE = ("data.height=320", "data.width=512"), ("data.height=576", "data.width=1024")
# As many frames as fit: a case of more is a row that says so. T5 takes no memory of the device
# (trainer.low_vram), and a table of words takes its place.
FRAMES = {f"{n} frames": (f"data.frames={n}",) for n in (144, 36, 9)}
TOLD = (
    "init_from=null", "conditioning=words", "conditioning.offer=tokens", "conditioning.width=4096",
    "conditioning.max_words=120", "conditioning.buckets=64",
)  # fmt: skip
SQUARES = (
    "data=moving_digits", "data.speed=1", "data.height=512", "data.width=512", "data.batch_size=1",
)  # fmt: skip
FIRST = ("data=moving_digits", "data.speed=1", "trainer=single", "trainer.accumulate=1")

# recipe -> how it is measured: another system is another entry
SYSTEMS = {
    "ldm_celebahq_vq4_first_stage": System(
        FACES, {"as published: fp32": ()}, ("reconstruction.lpips=random",)
    ),
    "ldm_celebahq_vq4": System(
        (*FACES, "data.batch_size=48"),
        {"as published: fp32": (), "bf16": ("precision=bf16",)},
    ),
    "dynamicrafter_512": System((*CLIPS, *SMALL, "data.batch_size=2"), CRAFTER, FROM_NOTHING),
    "dynamicrafter_512_interp": System(
        (*CLIPS, *SMALL, "data.batch_size=2"), CRAFTER, FROM_NOTHING
    ),
    "dynamicrafter_1024": System((*CLIPS, *LARGE, "data.batch_size=1"), CRAFTER, FROM_NOTHING),
    "easyanimate_v2_stage3": System(SQUARES, FRAMES, TOLD),
    "easyanimate_v2_lora": System(
        SQUARES,
        {
            f"{name}; published: 24 GB": of
            for name, of in FRAMES.items()
        },
        TOLD,
    ),
    "easyanimate_v2_vae_magvit": System(
        (*FIRST, "data.frames=9", "data.height=128", "data.width=128"),
        {"as published: fp32, two clips": ("task.batch_size=2",)},
        ("init_from=null", "reconstruction.lpips=random"),
    ),
    "easyanimate_v2_vae_slice": System(
        (*FIRST, "data.frames=25", "data.height=256", "data.width=256"),
        {"as published: fp32, one clip": ("task.batch_size=1",)},
        ("init_from=null", "reconstruction.lpips=random"),
    ),
}


class Done(Exception):
    """All steps are measured: the run ends before it would save."""


class Watch(Callback):
    """Times steps, reads the peak of memory, and profiles the step after those."""

    def __init__(self, training: Training) -> None:
        self.training, self.device = training, training.system.device
        self.ends: list[float] = []
        self.memory: dict[str, float] = {}
        self.spent: dict[str, float] = {}  # seconds by operation, of one step
        self.profiler = torch.profiler.profile()

    def on_train_batch_end(self, *rest: Any) -> None:
        if not self.training.just_stepped:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        step = len(self.ends)
        if step == WARM and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if step == WARM + MEASURED:
            if self.device.type == "cuda":
                self.memory = {
                    "allocated": torch.cuda.max_memory_allocated(self.device) / GIB,
                    "reserved": torch.cuda.max_memory_reserved(self.device) / GIB,
                }
            self.profiler.start()
        if step == WARM + MEASURED + 1:
            self.profiler.stop()
            self.spent = self.operations()
            raise Done

    def seconds(self) -> list[float]:
        """Of each measured step."""
        ends = self.ends[WARM - 1 : WARM + MEASURED]
        return [b - a for a, b in pairwise(ends)]

    def operations(self) -> dict[str, float]:
        """Seconds of the device in each operation itself; kernels count for what launched them."""
        field = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        found = {
            e.key: getattr(e, field) * 1e-6
            for e in self.profiler.key_averages()
            if e.device_type == torch.autograd.DeviceType.CPU
        }
        return {k: s for k, s in sorted(found.items(), key=lambda x: -x[1]) if s > 0}


def kind_of(operation: str) -> str:
    parts = operation.lower()
    return next((k for k, of in KINDS.items() if any(p in parts for p in of)), "the rest")


def kinds(spent: dict[str, float]) -> dict[str, float]:
    """Share of each kind of operation, the largest first."""
    total, found = sum(spent.values()), {}
    for operation, seconds in spent.items():
        kind = kind_of(operation)
        found[kind] = found.get(kind, 0.0) + seconds / total
    return dict(sorted(found.items(), key=lambda x: -x[1]))


def configured(name: str, case: str | None, *more: str) -> Root:
    """The recipe with generated clips and random weights; `case` None is its tiny sibling.

    Later settings replace earlier ones.
    """
    words = ["steps=1000", *EVERYWHERE]
    if case is None:
        words += [f"experiment={name}_tiny", "trainer.accelerator=cpu"]
    else:
        system = SYSTEMS[name]
        words += [f"experiment={name}", *system.clips, *system.random, *system.cases[case]]
    said = {w.partition("=")[0]: w for w in (*words, *more)}
    if "init_from" not in "".join(more):  # an adapter wants weights to be beside
        said = {k: w for k, w in said.items() if not k.startswith("adapter")}
        said["adapter"] = "adapter=null"
    return compose(*said.values())


def built(name: str, case: str | None, folder: Path) -> Trainable:
    """The system with random weights, those below an adapter too."""
    root = configured(name, case)
    if root.task.plugin == "task/train_vae":
        return build_autoencoding(wire(root).root)
    system = build_system(wire(root))
    if case is None or not any(word.startswith("adapter=") for word in SYSTEMS[name].cases[case]):
        return system
    base = weight_files.write(system.trainable_state(), folder / "base.safetensors")
    del system
    return build_system(wire(configured(name, case, f"init_from={base}")))


def measure(name: str, case: str | None) -> dict[str, Any]:
    """A row of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"system": name, "case": case or "tiny sibling"}
    with tempfile.TemporaryDirectory() as folder:
        system = built(name, case, Path(folder))
        row |= {"precision": system.root.precision, "clips": clips_per_step(system.root)}
        row["trained"] = sum(p.numel() for p in system.parameters() if p.requires_grad)
        with open_run(folder, "benchmark", {}, "never") as run:
            try:
                with start(system, run) as training:
                    watch = Watch(training)
                    with suppress(Done):
                        fit(training, [watch])
            except torch.OutOfMemoryError as e:
                return row | {"failed": f"does not fit: {str(e).splitlines()[0]}"}
    seconds, spent = watch.seconds(), watch.spent
    row |= {"seconds": seconds, "median": statistics.median(seconds), "memory_gib": watch.memory}
    return row | {"kinds": kinds(spent), "operations": dict([*spent.items()][:TOP])}


def line(row: dict[str, Any]) -> str:
    head = f"| {row['system']} | {row['case']} | {row['clips']} | {row['trained'] / 1e6:.1f} |"
    if "failed" in row:
        return f"{head} {row['failed'].replace('|', '/')} | | | |"
    memory = [f"{row['memory_gib'][k]:.1f}" if row["memory_gib"] else "" for k in
              ("allocated", "reserved")]  # fmt: skip
    spent = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in row["kinds"].items())
    return f"{head} {row['median']:.3f} | {' | '.join(memory)} | {spent} |"


def table(result: dict[str, Any]) -> str:
    made = result["machine"]
    parts = ", ".join(f"{k} {v}" for k, v in made.items() if k != "device")
    lines = [f"# Training steps on {made['device']}", "", f"{parts}.", ""]
    lines += [
        "| recipe | settings | clips a step | trained, M | s a step | peak allocated, GiB "
        "| peak reserved, GiB | device time |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    return "\n".join([*lines, *map(line, result["rows"])]) + "\n"


def machine(tiny: bool) -> dict[str, str]:
    device = platform.machine() if tiny else torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "lightning": lightning.__version__,
            "python": platform.python_version()}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("systems", nargs="*", help=f"of {', '.join(SYSTEMS)}; all of them")
    parser.add_argument("--tiny", action="store_true", help="tiny siblings on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    if unknown := set(args.systems) - SYSTEMS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: want some of {', '.join(SYSTEMS)}")
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --tiny takes tiny siblings without one")
    rows = []
    for name in args.systems or SYSTEMS:
        for case in (None,) if args.tiny else SYSTEMS[name].cases:
            rows.append(measure(name, case))
            print(line(rows[-1]), flush=True)
    result = {"machine": machine(args.tiny), "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "training_steps.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "training_steps.md").write_text(table(result))
    print(f"written: {args.out / 'training_steps.json'}, {args.out / 'training_steps.md'}")


if __name__ == "__main__":
    main()
