"""Tests the Triton kernels on this machine's GPU, then measures them against their peers.

    python benchmarks/gpu_kernels.py            # writes benchmarks/results/kernels.{json,md}
    python benchmarks/gpu_kernels.py --smoke    # tiny sizes on a CPU, to test the script

The protocol is in README.md. Nothing is measured if a test fails.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernels
from benchmarks.common import HOME, RESULTS, installed, listed, write
from kernels._benchmark import copy_bandwidth, measure, time_calls
from kernels.group_norm import benchmark as group_norm
from kernels.temporal_attention import benchmark as temporal_attention

OPS = {"group_norm": group_norm, "temporal_attention": temporal_attention}
PACKAGES = ("torch", "triton", "liger-kernel", "apex", "xformers")


def machine(device: str) -> dict[str, Any]:
    """Device and versions."""
    if device != "cuda":
        return {"device": platform.machine()} | installed(*PACKAGES)
    gpu = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return gpu | installed(*PACKAGES)


def check() -> None:
    """Runs all kernel tests, including those for a GPU. Raises SystemExit if one fails."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu or not slow", "-q"]
    if subprocess.run(command, cwd=HOME, check=False).returncode:
        raise SystemExit("a test failed; nothing was measured")


def operations(
    names: list[str], dtypes: list[torch.dtype], smoke: bool, bandwidth: float
) -> Iterator[dict[str, Any]]:
    for op in names:
        for dtype in dtypes:
            for case in OPS[op].cases(smoke):
                for row in measure(case, dtype, "cpu" if smoke else "cuda", bandwidth):
                    print(line(row), flush=True)
                    yield {"op": op, **row}
                if not smoke:
                    torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    head = f"{row['case']:30} {row['dtype']:9} {row['impl']:34} {row['pass']:9}"
    if "failed" in row:
        return f"{head} {row['failed'][:80]}"
    return f"{head} {row['ms']:9.4f} ms {100 * row['copy_fraction']:5.1f} % of copy"


# --- a training step ------------------------------------------------------------------------------


def training_steps() -> Iterator[dict[str, Any]]:
    """A step of DynamiCrafter-512's UNet under bf16 autocast, with each implementation."""
    from benchmarks.gpu_training_steps import SYSTEMS, configured
    from plugins.backbone.unet3d import UNet3D
    from sandbox.contracts import Conditions

    case = next(iter(SYSTEMS["dynamicrafter_512"].cases))
    config = configured("dynamicrafter_512", case).backbone
    for impl, compiled in (("eager", False), ("eager", True), ("triton", False), ("triton", True)):
        name = f"kernels={impl}{', torch.compile' if compiled else ''}"
        row: dict[str, Any] = {"op": "training step", "case": "DynamiCrafter-512 UNet, batch 1"}
        row |= {"impl": name, "dtype": "bf16 autocast", "pass": "step"}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = UNet3D(config)
            z, t = torch.randn(1, 4, 16, 40, 64), torch.tensor([500])
            cond = Conditions(
                context=torch.randn(1, 77, 1024), image_context=torch.randn(1, 16, 16, 1024),
                concat=torch.randn(1, 4, 16, 40, 64), scalars={"fps": torch.tensor([10.0])},
            )  # fmt: skip
        call = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(call=call, optimizer=optimizer, z=z, t=t, cond=cond) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = call(z, t, cond).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            with kernels.use(impl):
                for _ in range(3):
                    step()
                torch.cuda.reset_peak_memory_stats()
                row |= time_calls([step], "cuda")
            row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        except RuntimeError as e:  # out of memory, or compilation fails
            row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        print(f"{name:34} {row.get('ms', row.get('failed'))}", flush=True)
        yield row
        del model, call, optimizer, step


# --- results --------------------------------------------------------------------------------------


def crossovers(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """The number of elements from which Triton, including host time, is never slower than eager.

    For CROSSOVER in kernels/_dispatch.py; None if the largest size is slower.
    """
    eager = {"group_norm": "eager, same dtype", "temporal_attention": "permute + SDPA default"}
    found: dict[str, int | None] = {}
    for op, peer in eager.items():
        times: dict[tuple, dict[str, float]] = {}
        for row in rows:
            if row["op"] == op and row["pass"] == "both" and row["impl"] in ("triton", peer):
                size = torch.Size(row["shape"]).numel()
                times.setdefault((size, row["case"], row["dtype"]), {})[row["impl"]] = row["ms"]
        least = None
        for (size, *_), by in sorted(times.items(), reverse=True):
            if len(by) < 2:
                continue
            if by["triton"] > by[peer]:
                break
            least = size
        found[op] = least
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: a table for each operation and pass."""
    machine = result["machine"]
    lines = [f"# Kernels on {machine['device']}", "", f"{listed(machine)}.", ""]
    lines += [f"Copy bandwidth {result['copy_bandwidth'] / 1e12:.2f} TB/s, read plus written.", ""]
    lines += ["`graph` is the time in a CUDA graph, without host time, for short calls.", ""]
    rows = [r for r in result["rows"] if r["op"] in OPS]
    for op in dict.fromkeys(r["op"] for r in rows):
        for which in ("forward", "backward", "both"):
            lines += [f"## {op}, {which}", "", "| size | dtype | by | ms | graph | % of copy |"]
            lines += ["|---|---|---|--:|--:|--:|"]
            for r in rows:
                if r["op"] == op and r["pass"] in (which, "all"):
                    lines.append(_cells(r))
            lines.append("")
    steps = [r for r in result["rows"] if r["op"] == "training step"]
    if steps:
        lines += ["## Training step", "", "| model | by | ms | peak MB |", "|---|---|--:|--:|"]
        for r in steps:
            time = f"{r['ms']:.1f}" if "ms" in r else r["failed"]
            lines.append(f"| {r['case']} | {r['impl']} | {time} | {r.get('peak_mb', 0):.0f} |")
        lines.append("")
    return [*lines, f"Crossover for `kernels/_dispatch.py`: {result['crossover']}."]


def _cells(r: dict[str, Any]) -> str:
    head = f"| {r['case']} | {r['dtype']} | {r['impl']} |"
    if "failed" in r:
        return f"{head} {r['failed'][:60].replace('|', '/')} | | |"
    graph = f"{r['graph_ms']:.4f}" if "graph_ms" in r else ""
    return f"{head} {r['ms']:.4f} | {graph} | {100 * r['copy_fraction']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--no-step", action="store_true", help="skip the training step")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; use --smoke to run tiny sizes on a CPU")
    if device == "cuda":
        check()
    torch._dynamo.config.cache_size_limit = 256  # each size is a separate graph
    bandwidth = copy_bandwidth(device, 2**20 if args.smoke else 4 * 2**30)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    with nullcontext() if args.smoke else torch.cuda.device(0):
        rows = list(operations(args.ops, dtypes, args.smoke, bandwidth))
        rows += [] if args.smoke or args.no_step else list(training_steps())
    result = {
        "machine": machine(device), "copy_bandwidth": bandwidth, "crossover": crossovers(rows),
        "rows": rows,
    }  # fmt: skip
    write("kernels", result, table(result), args.out)


if __name__ == "__main__":
    main()
