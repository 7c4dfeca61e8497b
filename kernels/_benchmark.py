"""How an operation is measured beside its peers: the protocol of benchmarks/README.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

L2 = 60 * 2**20  # bytes; the second cache of an H200
CACHES = 3  # inputs of all rounds are so many times as large, so that none is found in the cache
SHORT = 0.03  # ms; below it a launch from the host takes longer than the kernel
MAX_SETS = 64
BAR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # a wrong peer is not timed

Call = Callable[..., Tensor]


@dataclass
class Case:
    """A size at which an operation is measured.

    make: (dtype, seed, device) -> its tensors; tensors_forward, tensors_backward: how many of the
    size of the first must move at least.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, int, str], tuple[Tensor, ...]]
    exact: Call  # the definition, for float64
    peers: dict[str, Callable[[], Call]]  # what is not installed raises ImportError
    tensors_forward: int
    tensors_backward: int


def copy_bandwidth(device: str = "cuda", size: int = 4 * 2**30) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / (timed([lambda: y.copy_(x)], device)["ms"] * 1e-3)


def measured(case: Case, dtype: torch.dtype, device: str, bandwidth: float) -> Iterator[dict]:
    """A row for each peer and each of forward, backward and both; failures are rows too."""
    sample = case.make(dtype, 0, device)
    each = sample[0].numel() * sample[0].element_size()
    sets = max(1, min(MAX_SETS, -(-CACHES * L2 // each))) if device == "cuda" else 2
    given = [sample, *(case.make(dtype, i, device) for i in range(1, sets))]
    if sample[0].numel() <= 2**27:
        want = case.exact(*(t.detach().double() for t in sample))
    else:  # float64 of the largest would not fit beside the rest
        want = case.exact(*(t.detach().float() for t in sample))
    minimal = {"forward": case.tensors_forward * each, "backward": case.tensors_backward * each}
    minimal["both"] = sum(minimal.values())
    for name, load in case.peers.items():
        row: dict[str, Any] = {"case": case.name, "shape": list(case.shape), "impl": name}
        row |= {"dtype": str(dtype).removeprefix("torch."), "tensor_mb": each / 1e6}
        try:
            call = load()
            out = call(*sample)
            off = ((out.detach().double() - want).norm() / want.norm()).item()
            if not off < BAR[dtype]:
                raise RuntimeError(f"wrong by {off:.1e}")
            row |= {"error": off, "out_strides": list(out.stride()), "peak_mb": _peak(call, sample)}
            grad = torch.randn_like(out)
            del out
            for which, calls in _passes(call, given, grad).items():
                times = timed(calls, device)
                rate = minimal[which] / (times["ms"] * 1e-3)
                yield row | times | {
                    "pass": which, "bytes": minimal[which], "copy_fraction": rate / bandwidth,
                }  # fmt: skip
        except (ImportError, RuntimeError, ValueError) as e:  # a peer's limit is a result
            yield row | {"pass": "all", "failed": f"{type(e).__name__}: {str(e).splitlines()[0]}"}


def _passes(call: Call, given: Sequence[tuple], grad: Tensor) -> dict[str, list[Callable]]:
    """Functions without arguments, one for each set of inputs."""
    wanted = [[t for t in tensors if t.requires_grad] for tensors in given]
    outs = [call(*tensors) for tensors in given]

    def forward(i: int) -> Callable:
        frozen = [t.detach() for t in given[i]]
        return lambda: call(*frozen)

    def backward(i: int) -> Callable:
        return lambda: torch.autograd.grad(outs[i], wanted[i], grad, retain_graph=True)

    def both(i: int) -> Callable:
        return lambda: torch.autograd.grad(call(*given[i]), wanted[i], grad)

    ways = {"forward": forward, "backward": backward, "both": both}
    return {name: [way(i) for i in range(len(given))] for name, way in ways.items()}


def timed(calls: Sequence[Callable], device: str) -> dict[str, float]:
    """Milliseconds of one call: median and 20 % and 80 % quantiles; of a CUDA graph where short."""
    turn = cycle(calls)
    if device != "cuda":
        spent = []
        for _ in range(5):
            before = time.perf_counter()
            next(turn)()
            spent.append(1e3 * (time.perf_counter() - before))
        return {"ms": statistics.median(spent), "p20": min(spent), "p80": max(spent)}
    from triton.testing import do_bench

    quantiles = do_bench(lambda: next(turn)(), warmup=25, rep=200, quantiles=[0.5, 0.2, 0.8])
    found = dict(zip(("ms", "p20", "p80"), quantiles, strict=True))
    if found["ms"] < SHORT:
        found["graph_ms"] = _replayed(calls)
    return found


def _replayed(calls: Sequence[Callable]) -> float:
    """Milliseconds of a call without the host: all calls in one CUDA graph."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return do_bench(graph.replay, warmup=25, rep=100, return_mode="median") / len(calls)


def _peak(call: Call, tensors: tuple[Tensor, ...]) -> float | None:
    """Megabytes of forward and backward beside the inputs."""
    if tensors[0].device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(*tensors)
    torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out))
    return (torch.cuda.max_memory_allocated() - before) / 1e6
