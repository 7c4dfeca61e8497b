"""Time, peak memory and device time by operation of full-size training steps on a GPU.

    python benchmarks/gpu_training_steps.py                            # all systems below
    python benchmarks/gpu_training_steps.py dynamicrafter_512          # selected systems
    python benchmarks/gpu_training_steps.py --tiny ldm_celebahq_vq4    # tiny sibling, on a CPU

Random weights and generated clips at the published sizes. The steps are those of
`training.loop.fit`: frozen encoders, first stage, noise, loss, backward, optimizer, EMA.
One step warms up, three are measured, one more is profiled with torch.profiler. A case that runs
out of memory is a row with the error. Writes benchmarks/results/training_steps.{json,md}.
"""

from __future__ import annotations

import argparse
import gc
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

import torch
from lightning import Callback
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, installed, listed, write
from sandbox import compose
from sandbox.config.root import Root
from sandbox.config.wiring import wire
from sandbox.model.trainable import Trainable
from sandbox.runs.resume import open_run
from sandbox.storage import weight_files
from sandbox.training.build import build_system, clips_per_step
from sandbox.training.first_stage import build_autoencoding
from sandbox.training.loop import fit
from sandbox.training.setup import start
from sandbox.training.state import Training

WARM, MEASURED = 1, 3  # optimizer steps
GIB = 2**30
TOP = 12  # operations per row
COMMON = (
    "callbacks=[]", "logger=null", "checkpoint.best=0", "checkpoint.weights_every=0",
    "vae.weights=null", "trainer.repeat=1", "data.num_workers=0",
)  # fmt: skip
KINDS = {  # of operations, by parts of their names; the first match counts
    "attention": ("attention", "flash"),
    "convolution": ("conv",),
    "matrix products": ("mm", "linear", "matmul"),
    "norms": ("norm",),
    "optimizer and EMA": ("foreach", "adam", "lerp"),
    "copies": ("copy", "cat", "clone", "contiguous", "memcpy", "memset", "fill", "zero"),
}


@dataclass(frozen=True)
class System:
    """The settings with which a recipe is measured.

    clips: generated clips of the published size; cases: further settings, by name; random: random
    weights instead of files.
    """

    clips: tuple[str, ...]
    cases: dict[str, tuple[str, ...]]
    random: tuple[str, ...] = ()


FACES = ("data=moving_digits_still", "data.height=256", "data.width=256")
CLIPS = ("data=moving_digits_rates", "data.frames=16", "data.speed=1", "data.random_speed=false")
ONE_DEVICE = ("trainer=single", "trainer.accumulate=2", "trainer.clip=0.5")  # published: 8
CRAFTER = {
    "as published on each device: fp16, two micro-batches": ONE_DEVICE,
    "bf16, two micro-batches": (*ONE_DEVICE, "precision=bf16"),
    "for 24 GB: bf16, LoRA of rank 64, one clip": (
        *ONE_DEVICE, "precision=bf16", "adapter=lora", "adapter.rank=64", "data.batch_size=1",
    ),
}  # fmt: skip
RANDOM_WEIGHTS = ("init_from=null", "conditioning.weights=random")
SMALL, LARGE = ("data.height=320", "data.width=512"), ("data.height=576", "data.width=1024")
# Decreasing numbers of frames; cases that do not fit report an error. A word embedding replaces T5,
# which takes no device memory (trainer.low_vram).
FRAMES = {f"{n} frames": (f"data.frames={n}",) for n in (144, 36, 9)}
WORDS = (
    "init_from=null", "conditioning=words", "conditioning.offer=tokens", "conditioning.width=4096",
    "conditioning.max_words=120", "conditioning.buckets=64",
)  # fmt: skip
SQUARES = (
    "data=moving_digits", "data.speed=1", "data.height=512", "data.width=512", "data.batch_size=1",
)  # fmt: skip
FIRST_STAGE = ("data=moving_digits", "data.speed=1", "trainer=single", "trainer.accumulate=1")

# recipe -> settings; add an entry to measure another recipe
SYSTEMS = {
    "ldm_celebahq_vq4_first_stage": System(
        FACES, {"as published: fp32": ()}, ("reconstruction.lpips=random",)
    ),
    "ldm_celebahq_vq4": System(
        (*FACES, "data.batch_size=48"),
        {"as published: fp32": (), "bf16": ("precision=bf16",)},
    ),
    "dynamicrafter_512": System((*CLIPS, *SMALL, "data.batch_size=2"), CRAFTER, RANDOM_WEIGHTS),
    "dynamicrafter_512_interp": System(
        (*CLIPS, *SMALL, "data.batch_size=2"), CRAFTER, RANDOM_WEIGHTS
    ),
    "dynamicrafter_1024": System((*CLIPS, *LARGE, "data.batch_size=1"), CRAFTER, RANDOM_WEIGHTS),
    "easyanimate_v2_stage3": System(SQUARES, FRAMES, WORDS),
    "easyanimate_v2_lora": System(
        SQUARES,
        {f"{name}; published: 24 GB": of for name, of in FRAMES.items()},
        WORDS,
    ),
    "easyanimate_v2_vae_magvit": System(
        (*FIRST_STAGE, "data.frames=9", "data.height=128", "data.width=128"),
        {"as published: fp32, two clips": ("task.batch_size=2",)},
        ("init_from=null", "reconstruction.lpips=random"),
    ),
    "easyanimate_v2_vae_slice": System(
        (*FIRST_STAGE, "data.frames=25", "data.height=256", "data.width=256"),
        {"as published: fp32, one clip": ("task.batch_size=1",)},
        ("init_from=null", "reconstruction.lpips=random"),
    ),
}


class Done(Exception):
    """Ends the run when all steps are measured, before it saves."""


class Watch(Callback):
    """Times steps, reads peak memory, and profiles the following step."""

    def __init__(self, training: Training) -> None:
        self.training, self.device = training, training.system.device
        self.ends: list[float] = []
        self.memory: dict[str, float] = {}
        self.spent: dict[str, float] = {}  # seconds per operation of one step
        self.profiler = torch.profiler.profile()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
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
        """Duration of each measured step."""
        ends = self.ends[WARM - 1 : WARM + MEASURED]
        return [b - a for a, b in pairwise(ends)]

    def operations(self) -> dict[str, float]:
        """Device seconds of each operation itself, including the kernels that it launched."""
        field = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        found = {
            e.key: getattr(e, field) * 1e-6
            for e in self.profiler.key_averages()
            if e.device_type == DeviceType.CPU
        }
        return {k: s for k, s in sorted(found.items(), key=lambda x: -x[1]) if s > 0}


def kind_of(operation: str) -> str:
    parts = operation.lower()
    return next((k for k, of in KINDS.items() if any(p in parts for p in of)), "other")


def kinds(spent: dict[str, float]) -> dict[str, float]:
    """Share of each kind of operation, largest first."""
    total, found = sum(spent.values()), {}
    for operation, seconds in spent.items():
        kind = kind_of(operation)
        found[kind] = found.get(kind, 0.0) + seconds / total
    return dict(sorted(found.items(), key=lambda x: -x[1]))


def configured(name: str, case: str | None, *more: str) -> Root:
    """The recipe with generated clips and random weights, or (`case` None) its tiny sibling.

    Later settings override earlier ones.
    """
    words = ["steps=1000", *COMMON]
    if case is None:
        words += [f"experiment={name}_tiny", "trainer.accelerator=cpu"]
    else:
        system = SYSTEMS[name]
        words += [f"experiment={name}", *system.clips, *system.random, *system.cases[case]]
    settings = {w.partition("=")[0]: w for w in (*words, *more)}
    if "init_from" not in "".join(more):  # adapters need pretrained weights
        settings = {k: w for k, w in settings.items() if not k.startswith("adapter")}
        settings["adapter"] = "adapter=null"
    return compose(*settings.values())


def built(name: str, case: str | None, folder: Path) -> Trainable:
    """The system with random weights, including those below an adapter."""
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
                return row | {"failed": f"out of memory: {str(e).splitlines()[0]}"}
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


def table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"# Training steps on {machine['device']}", "", f"{listed(machine)}.", "",
        "| recipe | settings | clips per step | trained, M | s per step | peak allocated, GiB "
        "| peak reserved, GiB | device time |",
        "|---|---|--:|--:|--:|--:|--:|---|",
        *map(line, rows),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("systems", nargs="*", help=f"default: all of {', '.join(SYSTEMS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny siblings on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    if unknown := set(args.systems) - SYSTEMS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: want some of {', '.join(SYSTEMS)}")
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; use --tiny to run tiny siblings on a CPU")
    rows = []
    for name in args.systems or SYSTEMS:
        for case in (None,) if args.tiny else SYSTEMS[name].cases:
            rows.append(measure(name, case))
            print(line(rows[-1]), flush=True)
    machine: dict[str, Any] = installed("torch", "lightning")
    machine["device"] = platform.machine() if args.tiny else torch.cuda.get_device_name()
    result = {"machine": machine, "rows": rows}
    write("training_steps", result, table(machine, rows), args.out)


if __name__ == "__main__":
    main()
