"""Time and peak memory of published first stages: encoding and decoding, with slices and tiles.

    python benchmarks/gpu_first_stages.py         # writes benchmarks/results/first_stages.{json,md}
    python benchmarks/gpu_first_stages.py --tiny  # tiny sizes on a CPU

Random weights, noise clips, bf16, no gradients. A case that runs out of memory is a row with the
error.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import RESULTS, installed, listed, write
from sandbox.config import composition, discovery
from sandbox.config.root import Root, to_root
from sandbox.config.wiring import wire
from sandbox.model.components import build, use_kernels

GIB = 2**30
UNSPLIT = ("vae.mini_batch_encoder=145", "vae.mini_batch_decoder=37", "vae.smooth_output=false")


@dataclass(frozen=True)
class Case:
    """A first stage and a clip size (frames, height, width)."""

    name: str
    words: tuple[str, ...]
    size: tuple[int, int, int]


def cases(tiny: bool) -> Iterator[Case]:
    """The published clip sizes, each with and without tiling."""
    magvit, slices, cogvideox = ("vae=magvit_easyanimate_v2", "experiment=easyanimate_v2_vae_slice",
                              "vae=cogvideox_2b")  # fmt: skip
    clips = {
        "magvit, windows of 9": ((magvit, "vae.smooth_output=false"), (144, 512, 512)),
        "magvit, smoothed windows": ((magvit,), (144, 512, 512)),
        "magvit, in one piece": ((magvit, *UNSPLIT), (145, 512, 512)),
        "slice, slices of 8": ((slices,), (144, 512, 512)),
        "cogvideox, pieces of 8": ((cogvideox,), (49, 480, 720)),
    }
    if tiny:
        clips = {
            "magvit, windows of 9": (("experiment=easyanimate_v2_vae_magvit_tiny",), (18, 32, 32)),
            "slice, slices of 8": (("experiment=easyanimate_v2_vae_slice_tiny",), (16, 32, 32)),
            "cogvideox, pieces of 8": (("experiment=cogvideox_2b_sft_tiny",), (9, 32, 32)),
        }
    for name, (words, size) in clips.items():
        for tiling in (False, True):
            overrides = (*words, f"vae.use_tiling={str(tiling).lower()}")
            yield Case(f"{name}{', tiles' if tiling else ''}", overrides, size)


def configured(case: Case) -> Root:
    frames, height, width = case.size
    size = (f"data.frames={frames}", f"data.height={height}", f"data.width={width}")
    limits = "backbone.max_frames=64", "backbone.max_height=64", "backbone.max_width=96"
    discovery.setup()
    vae = to_root(composition.compose([*case.words, "vae.weights=null"])).vae
    root = to_root(composition.compose(["~logger", "data.speed=1", *limits, *size]))
    return wire(replace(root, vae=vae)).root


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """A row: median seconds and peak memory of encoding and of decoding."""
    root, (frames, height, width) = configured(case), case.size
    use_kernels(root)
    row: dict[str, Any] = {"case": case.name, "clip": f"{frames}x{height}x{width}"}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        network = build("vae", root).to(dtype).eval()
        x = torch.rand(1, 3, frames, height, width, dtype=dtype) * 2 - 1
    try:
        z, encoded = timed(lambda: network.scaled(network.encode(x).mean), device, rounds)
        _, decoded = timed(lambda: network.decode(z), device, rounds)
    except torch.OutOfMemoryError as e:
        return row | {"failed": f"out of memory: {str(e).splitlines()[0]}"}
    return row | {"encode": encoded, "decode": decoded}


@torch.no_grad()
def timed(call: Callable[[], Tensor], device: str, rounds: int) -> tuple[Tensor, dict[str, Any]]:
    """The result of `call`, and its time and peak memory after a warm-up."""
    seconds, is_cuda = [], device == "cuda"
    result = call()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        started = time.perf_counter()
        result = call()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB if is_cuda else None
    reserved = torch.cuda.max_memory_reserved() / GIB if is_cuda else None
    return result, {
        "seconds": statistics.median(seconds),
        "allocated": peak,
        "reserved": reserved,
    }


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['case']} | {row['clip']} | {row['failed'].replace('|', '/')} | | | |"
    cells = [
        cell
        for part in (row["encode"], row["decode"])
        for cell in (f"{part['seconds']:.2f}", "" if part["allocated"] is None else
                     f"{part['allocated']:.1f} / {part['reserved']:.1f}")
    ]  # fmt: skip
    return f"| {row['case']} | {row['clip']} | {' | '.join(cells)} |"


def table(machine: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        "| first stage | clip | encode, s | GiB allocated / reserved | decode, s | GiB allocated / "
        "reserved |\n|---|---|--:|--:|--:|--:|"
    )
    return [f"# First stages on {machine['device']}", "", f"{listed(machine)}.", "", head,
            *map(line, rows)]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny presets on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    device = "cpu" if args.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; use --tiny to run tiny presets on a CPU")
    rows = []
    for case in cases(args.tiny):
        rows.append(measure(case, device, args.rounds))
        print(line(rows[-1]), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    machine: dict[str, Any] = installed("torch")
    machine["device"] = platform.machine() if args.tiny else torch.cuda.get_device_name()
    write("first_stages", {"machine": machine, "rows": rows}, table(machine, rows), args.out)


if __name__ == "__main__":
    main()
