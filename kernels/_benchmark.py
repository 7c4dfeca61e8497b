"""Measures an operation against its peers; the protocol is in benchmarks/README.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

L2 = 60 * 2**20  # bytes; the L2 cache of an H200
CACHES = 3  # total size of the rotating inputs, in L2 caches, so that none is found in the cache
SHORT = 0.03  # ms; below it, host launch time exceeds kernel time
MAX_SETS = 64
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative L2

Call = Callable[..., Tensor]
Pass = Callable[[], object]  # one timed call


@dataclass
class Case:
    """A size at which an operation is measured.

    make: (dtype, seed, device) -> the input tensors; tensors_forward, tensors_backward: minimal
    memory traffic, in tensors of the size of the first input.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, int, str], tuple[Tensor, ...]]
    exact: Call  # the definition, for float64
    peers: dict[str, Callable[[], Call]]  # raise ImportError if not installed
    tensors_forward: int
    tensors_backward: int


def copy_bandwidth(device: str = "cuda", size: int = 4 * 2**30) -> float:
    """Bytes per second, read plus written, when copying `size` bytes."""
    x = torch.empty(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / (time_calls([lambda: y.copy_(x)], device)["ms"] * 1e-3)


def measure(case: Case, dtype: torch.dtype, device: str, bandwidth: float) -> Iterator[dict]:
    """A row for each peer and each of forward, backward and both; failures are rows too."""
    sample = case.make(dtype, 0, device)
    size = sample[0].numel() * sample[0].element_size()
    sets = max(1, min(MAX_SETS, -(-CACHES * L2 // size))) if device == "cuda" else 2
    inputs = [sample, *(case.make(dtype, i, device) for i in range(1, sets))]
    is_large = sample[0].numel() > 2**27  # float64 copies would not fit
    exact = torch.float32 if is_large else torch.float64
    want = case.exact(*(t.detach().to(exact) for t in sample))
    minimal = {"forward": case.tensors_forward * size, "backward": case.tensors_backward * size}
    minimal["both"] = sum(minimal.values())
    for name, load in case.peers.items():
        row: dict[str, Any] = {"case": case.name, "shape": list(case.shape), "impl": name}
        row |= {"dtype": str(dtype).removeprefix("torch."), "tensor_mb": size / 1e6}
        try:
            call = load()
            row |= _checked(call, sample, want, MAX_ERROR[dtype])
            for which, calls in _passes(call, inputs).items():
                times = time_calls(calls, device)
                achieved = minimal[which] / (times["ms"] * 1e-3)
                yield row | times | {
                    "pass": which, "bytes": minimal[which], "copy_fraction": achieved / bandwidth,
                }  # fmt: skip
        except (ImportError, RuntimeError, ValueError) as e:  # a peer's limit is a result
            yield row | {"pass": "all", "failed": f"{type(e).__name__}: {str(e).splitlines()[0]}"}


def _checked(call: Call, sample: tuple[Tensor, ...], want: Tensor, limit: float) -> dict[str, Any]:
    """Error, output strides and peak memory. Raises RuntimeError if the error exceeds `limit`."""
    out = call(*sample).detach()
    error = ((out.double() - want).norm() / want.norm()).item()
    if not error < limit:
        raise RuntimeError(f"wrong by {error:.1e}")
    return {"error": error, "out_strides": list(out.stride()), "peak_mb": _peak(call, sample)}


def _passes(call: Call, inputs: Sequence[tuple[Tensor, ...]]) -> dict[str, list[Pass]]:
    """The timed calls of each pass, one for each set of inputs."""
    wanted = [[t for t in tensors if t.requires_grad] for tensors in inputs]
    outs = [call(*tensors) for tensors in inputs]
    grad = torch.randn_like(outs[0])

    def forward(i: int) -> Pass:
        frozen = [t.detach() for t in inputs[i]]
        return lambda: call(*frozen)

    def backward(i: int) -> Pass:
        return lambda: torch.autograd.grad(outs[i], wanted[i], grad, retain_graph=True)

    def both(i: int) -> Pass:
        return lambda: torch.autograd.grad(call(*inputs[i]), wanted[i], grad)

    passes = {"forward": forward, "backward": backward, "both": both}
    return {name: [make(i) for i in range(len(inputs))] for name, make in passes.items()}


def time_calls(calls: Sequence[Pass], device: str) -> dict[str, float]:
    """Milliseconds per call: median, 20 % and 80 % quantiles; short ones also in a CUDA graph."""
    turn = cycle(calls)
    if device != "cuda":
        times = []
        for _ in range(5):
            started = time.perf_counter()
            next(turn)()
            times.append(1e3 * (time.perf_counter() - started))
        return {"ms": statistics.median(times), "p20": min(times), "p80": max(times)}
    p20, ms, p80 = _bench(lambda: next(turn)(), 200)
    found = {"ms": ms, "p20": p20, "p80": p80}
    if ms < SHORT:
        found["graph_ms"] = _graph_ms(calls)
    return found


def _bench(call: Pass, milliseconds: int) -> tuple[float, float, float]:
    """20 % quantile, median and 80 % quantile, in milliseconds."""
    from triton.testing import do_bench

    found = do_bench(call, warmup=25, rep=milliseconds, quantiles=[0.2, 0.5, 0.8])
    assert isinstance(found, list)  # one value per quantile
    p20, median, p80 = found
    return p20, median, p80


def _graph_ms(calls: Sequence[Pass]) -> float:
    """Milliseconds per call without host time: all calls in one CUDA graph."""
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
    return _bench(graph.replay, 100)[1] / len(calls)


def _peak(call: Call, tensors: tuple[Tensor, ...]) -> float | None:
    """Megabytes that forward and backward allocate on top of the inputs; None on a CPU."""
    if tensors[0].device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(*tensors)
    torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out))
    return (torch.cuda.max_memory_allocated() - before) / 1e6
