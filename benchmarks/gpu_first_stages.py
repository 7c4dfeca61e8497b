"""First stages of published systems, there and back: time and peak memory, with slices and tiles.

    python benchmarks/gpu_first_stages.py         # writes benchmarks/results/first_stages.{json,md}
    python benchmarks/gpu_first_stages.py --tiny  # tiny sizes on a CPU

Weights are random, clips are noise, bf16 without gradients. A case that does not fit is a row that
says so.
"""

from __future__ import annotations

import argparse
import json
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

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

from sandbox import config  # noqa: E402 (the checkout, from wherever this is started)
from sandbox.config import Root  # noqa: E402
from sandbox.parts import build, use_kernels  # noqa: E402
from sandbox.wiring import wire  # noqa: E402

RESULTS = HOME / "benchmarks" / "results"
GIB = 2**30
WHOLE = ("vae.mini_batch_encoder=145", "vae.mini_batch_decoder=37", "vae.smooth_output=false")


@dataclass(frozen=True)
class Case:
    """A first stage with clips of one size: (frames, height, width)."""

    name: str
    words: tuple[str, ...]
    size: tuple[int, int, int]


def cases(tiny: bool) -> Iterator[Case]:
    """Clips of the published sizes, each in tiles and without."""
    magvit, slices, pieces = ("vae=magvit_easyanimate_v2", "experiment=easyanimate_v2_vae_slice",
                              "vae=cogvideox_2b")  # fmt: skip
    clips = {
        "magvit, windows of 9": ((magvit, "vae.smooth_output=false"), (144, 512, 512)),
        "magvit, smoothed windows": ((magvit,), (144, 512, 512)),
        "magvit, in one piece": ((magvit, *WHOLE), (145, 512, 512)),
        "slice, slices of 8": ((slices,), (144, 512, 512)),
        "cogvideox, pieces of 8": ((pieces,), (49, 480, 720)),
    }
    if tiny:
        clips = {
            "magvit, windows of 9": (("experiment=easyanimate_v2_vae_magvit_tiny",), (18, 32, 32)),
            "slice, slices of 8": (("experiment=easyanimate_v2_vae_slice_tiny",), (16, 32, 32)),
            "cogvideox, pieces of 8": (("experiment=cogvideox_2b_sft_tiny",), (9, 32, 32)),
        }
    for name, (words, size) in clips.items():
        for tiling in (False, True):
            said = (*words, f"vae.use_tiling={str(tiling).lower()}")
            yield Case(f"{name}{', tiles' if tiling else ''}", said, size)


def configured(case: Case) -> Root:
    frames, height, width = case.size
    size = (f"data.frames={frames}", f"data.height={height}", f"data.width={width}")
    room = "backbone.max_frames=64", "backbone.max_height=64", "backbone.max_width=96"
    config.setup()
    vae = config.to_root(config.compose([*case.words, "vae.weights=null"])).vae
    root = config.to_root(config.compose(["logger=null", "data.speed=1", *room, *size]))
    return wire(replace(root, vae=vae)).root


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """A row with seconds (median) and peak memory of encoding and of decoding."""
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
        return row | {"failed": f"does not fit: {str(e).splitlines()[0]}"}
    return row | {"encode": encoded, "decode": decoded}


@torch.no_grad()
def timed(call: Callable[[], Tensor], device: str, rounds: int) -> tuple[Tensor, dict[str, Any]]:
    """What it makes, and what that takes; the first call warms up."""
    seconds, is_cuda = [], device == "cuda"
    for i in range(rounds + 1):
        if is_cuda and i == 1:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made = call()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIB if is_cuda else None
    reserved = torch.cuda.max_memory_reserved() / GIB if is_cuda else None
    return made, {
        "seconds": statistics.median(seconds[1:]),
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


def table(made: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    parts = ", ".join(f"{k} {v}" for k, v in made.items() if k != "device")
    head = (
        "| first stage | clip | encode, s | GiB allocated / reserved | decode, s | GiB allocated / "
        "reserved |\n|---|---|--:|--:|--:|--:|"
    )
    return "\n".join([f"# First stages on {made['device']}", "", f"{parts}.", "", head,
                      *map(line, rows)]) + "\n"  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true", help="tiny presets on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    device = "cpu" if args.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --tiny takes tiny presets without one")
    rows = []
    for case in cases(args.tiny):
        rows.append(measure(case, device, args.rounds))
        print(line(rows[-1]), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    made = {"device": platform.machine() if args.tiny else torch.cuda.get_device_name(),
            "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": made, "rows": rows}
    (args.out / "first_stages.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "first_stages.md").write_text(table(made, rows))


if __name__ == "__main__":
    main()
