"""Shared by all Triton kernels: the launch record, tensor checks, and autograd helpers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

INSTALLED = find_spec("triton") is not None
HIP = torch.version.hip is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REGISTERS = 255  # maximum per thread; passing it stops ptxas from spilling loop counters
MAX_GRID = 2**31 - 1  # blocks of the first grid axis; the other axes (65,535) are not used
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])
FP_FUSION = True  # explicit: the default changes between Triton 3.9 and 3.10, and with it results


class Launch(NamedTuple):
    """A kernel with its arguments and launch options.

    The tests compile these records for GPUs that are not present and count their bytes.
    """

    kernel: Any
    programs: int
    args: dict[str, Any]
    warps: int  # of 32 threads
    registers: int | None = None  # maximum per thread; None: chosen by the compiler

    def __call__(self) -> None:
        self.kernel[(self.programs,)](**self.args, **self.options(HIP))

    def options(self, hip: bool) -> dict[str, Any]:
        """Compiler options. A warp has 64 threads on AMD (CDNA)."""
        warps = max(1, self.warps // 2) if hip else self.warps
        most = {"maxnreg": self.registers} if self.registers and not hip else {}
        return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": FP_FUSION, **most}

    def bytes(self) -> int:
        """Memory traffic if each tensor argument is read or written once."""
        tensors = (a for a in self.args.values() if isinstance(a, Tensor))
        return sum(a.numel() * a.element_size() for a in tensors)


def launch(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs the launches in order on `device`, which need not be the current device."""
    for one in launches:
        refuse_tangents(*one.args.values())
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        for one in launches:
            one()


def named_launch(
    module: Any, op: str, kernel: str, programs: int, warps: int, args: dict[str, Any]
) -> Launch:
    """A launch of `{op}_{kernel}_kernel` of `module`, with those of `args` that it takes."""
    function = getattr(module, f"{op}_{kernel}_kernel")
    return Launch(function, programs, {k: args[k] for k in function.arg_names}, warps)


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=4096)
def aligned(numbers: tuple[int, ...]) -> int:
    """The largest of 8, 4, 2 and 1 that divides all numbers: elements per vector load."""
    return next(v for v in (8, 4, 2, 1) if all(n % v == 0 for n in numbers))


def interpreted() -> bool:
    """Whether Triton's interpreter is on: kernels run in Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unsupported_tensors(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no Triton kernel can run on these tensors; None if one can."""
    tensors = [x, *(t for t in others if t is not None)]
    if not INSTALLED:
        return "the package triton is not installed"
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"{t.dtype} tensors"
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return f"tensors on several devices, {sorted(map(str, devices))}"
    if not (x.is_cuda or x.is_meta or (interpreted() and x.device.type == "cpu")):
        return f"it needs a CUDA device, and the tensors are on {x.device.type}"
    if torch._C._are_functorch_transforms_active():
        return "inside vmap or another torch.func transform"
    if any(has_tangent(t) for t in tensors):
        return "forward-mode derivatives"
    return None


def has_tangent(x: Tensor) -> bool:
    """Whether `x` is a dual tensor of torch.autograd.forward_ad, or of torch.func.jvp."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def refuse_tangents(*args: Any) -> None:
    """Raises RuntimeError for dual tensors, whose tangents kernels and custom operators drop."""
    if any(has_tangent(x) for x in args if isinstance(x, Tensor)):
        raise RuntimeError(
            "the Triton kernels have no forward-mode derivatives; use kernels=eager for this call"
        )


def is_traced(x: Tensor) -> bool:
    """Whether the call is recorded instead of run: torch.compile, meta and fake tensors."""
    return torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter)


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def zeroed(tensors: Tensors) -> Tensors:
    for t in tensors:
        t.zero_()
    return tensors


def filled(outputs: Tensors, values: Sequence[Tensor], needs: Sequence[bool]) -> Tensors:
    """`outputs`, with `values` copied into those that are needed."""
    for output, value, needed in zip(outputs, values, needs, strict=True):
        if needed:
            output.copy_(value)
    return outputs


def no_second_derivative(op: str) -> RuntimeError:
    return RuntimeError(
        f"kernels.{op}=triton has no second derivative; use kernels=eager for this run, "
        f"or impl='eager' for this call"
    )


class _FirstDerivative(torch.autograd.Function):
    """Gradients under `create_graph=True` whose own backward pass raises."""

    @staticmethod
    def forward(
        ctx: Any, op: str, compute: Callable[[], tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return compute()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise no_second_derivative(ctx.op)


def gradients(
    op: str, compute: Callable[[], tuple[Tensor | None, ...]], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """`compute()`, such that differentiating the result again raises RuntimeError."""
    if torch.is_grad_enabled():
        return _FirstDerivative.apply(op, compute, *(t for t in inputs if t is not None))
    return compute()
