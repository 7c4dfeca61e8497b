"""Checks the Triton kernels on this machine's GPU, then measures them beside their peers.

    python benchmarks/gpu_kernels.py            # writes benchmarks/results/kernels.{json,md}
    python benchmarks/gpu_kernels.py --smoke    # tiny sizes on the CPU: does this script run?

README.md has the protocol. Nothing is measured where a check fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

import kernels  # noqa: E402 (the checkout, from wherever this is started)
from kernels._benchmark import copy_bandwidth, measured, timed  # noqa: E402
from kernels.group_norm import benchmark as group_norm  # noqa: E402
from kernels.temporal_attention import benchmark as temporal_attention  # noqa: E402

RESULTS = HOME / "benchmarks" / "results"
OPS = {"group_norm": group_norm, "temporal_attention": temporal_attention}
PACKAGES = ("torch", "triton", "liger-kernel", "apex", "xformers")
PRESET = HOME / "conf" / "backbone" / "unet3d_dynamicrafter_512.yaml"


def machine(device: str) -> dict[str, Any]:
    """Device and versions; None for what is not installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "device": platform.machine()}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def check() -> None:
    """All tests of the kernels, those for a GPU too. Raises SystemExit where one fails."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu or not slow", "-q"]
    if subprocess.run(command, cwd=HOME, check=False).returncode:
        raise SystemExit("a check failed: nothing was measured")


def operations(
    names: list[str], dtypes: list[torch.dtype], smoke: bool, bandwidth: float
) -> Iterator[dict[str, Any]]:
    for op in names:
        for dtype in dtypes:
            for case in OPS[op].cases(smoke):
                for row in measured(case, dtype, "cpu" if smoke else "cuda", bandwidth):
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
    """A step of DynamiCrafter-512's UNet under bf16 autocast, by each implementation."""
    from omegaconf import OmegaConf

    from plugins.backbone.unet3d import UNet3D
    from sandbox.contracts import Conditions

    preset = OmegaConf.to_container(OmegaConf.load(PRESET))
    del preset["defaults"]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in preset.items()}
    for name, impl, compiled in (
        ("kernels=eager", "eager", False),
        ("kernels=eager, torch.compile", "eager", True),
        ("kernels=triton", "triton", False),
        ("kernels=triton, torch.compile", "triton", True),
    ):
        row: dict[str, Any] = {"op": "training step", "case": "DynamiCrafter-512 UNet, batch 1"}
        row |= {"impl": name, "dtype": "bf16 autocast", "pass": "step"}
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = UNet3D(UNet3D.Config(**settings))
            z, t = torch.randn(1, 4, 16, 40, 64), torch.tensor([500])
            told = Conditions(
                context=torch.randn(1, 77, 1024), image_context=torch.randn(1, 16, 16, 1024),
                concat=torch.randn(1, 4, 16, 40, 64), scalars={"fps": torch.tensor([10.0])},
            )  # fmt: skip
        call = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(call=call, optimizer=optimizer, z=z, t=t, told=told) -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = call(z, t, told).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            with kernels.use(impl):
                for _ in range(3):
                    step()
                torch.cuda.reset_peak_memory_stats()
                row |= timed([step], "cuda")
            row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        except RuntimeError as e:  # out of memory, or a graph that cannot be compiled
            row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        print(f"{name:34} {row.get('ms', row.get('failed'))}", flush=True)
        yield row
        del model, call, optimizer, step


# --- what comes of it -----------------------------------------------------------------------------


def crossovers(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """Numbers of the first tensor from which on Triton, host included, is never slower than eager.

    For CROSSOVER in kernels/_dispatch.py; None where the largest size is slower.
    """
    plain = {"group_norm": "eager, same dtype", "temporal_attention": "permute + SDPA default"}
    found: dict[str, int | None] = {}
    for op, peer in plain.items():
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


def table(result: dict[str, Any]) -> str:
    """Markdown: a table for each operation and pass."""
    made = result["machine"]
    parts = ", ".join(f"{k} {v}" for k, v in made.items() if v and k != "device")
    lines = [f"# Kernels on {made['device']}", "", f"{parts}.", ""]
    lines += [f"Copy bandwidth {result['copy_bandwidth'] / 1e12:.2f} TB/s, read and written.", ""]
    lines += ["`graph` is the time in a CUDA graph, without the host; given for short calls.", ""]
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
    lines += [f"Crossover for `kernels/_dispatch.py`: {result['crossover']}."]
    return "\n".join(lines) + "\n"


def _cells(r: dict[str, Any]) -> str:
    head = f"| {r['case']} | {r['dtype']} | {r['impl']} |"
    if "failed" in r:
        return f"{head} {r['failed'][:60].replace('|', '/')} | | |"
    graph = f"{r['graph_ms']:.4f}" if "graph_ms" in r else ""
    return f"{head} {r['ms']:.4f} | {graph} | {100 * r['copy_fraction']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--ops", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --smoke runs tiny sizes without one")
    if device == "cuda":
        check()
    torch._dynamo.config.cache_size_limit = 256  # each size is a graph of its own
    bandwidth = copy_bandwidth(device, 2**20 if args.smoke else 4 * 2**30)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    with nullcontext() if args.smoke else torch.cuda.device(0):
        rows = list(operations(args.ops, dtypes, args.smoke, bandwidth))
        rows += [] if args.smoke or args.no_step else list(training_steps())
    result = {
        "machine": machine(device), "copy_bandwidth": bandwidth, "crossover": crossovers(rows),
        "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "kernels.md").write_text(table(result))
    print(f"written: {args.out / 'kernels.json'}, {args.out / 'kernels.md'}")


if __name__ == "__main__":
    main()
