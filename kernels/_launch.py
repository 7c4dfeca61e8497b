"""What all Triton launches share: one record for a launch, and the rules of autograd around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
HIP = torch.version.hip is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REGISTERS = 255  # of a thread at most; told so, ptxas does not spill loop counters to use fewer
MAX_GRID = 2**31 - 1  # blocks of a grid's first axis; the others end at 65,535 and are not used


class Launch(NamedTuple):
    """A kernel and everything that it is called with.

    The tests compile these very records for machines that are not there, and add up their bytes.
    """

    kernel: Any
    programs: int
    args: dict[str, Any]
    warps: int  # of 32 threads
    registers: int | None = None  # of a thread at most; None leaves it to the compiler

    def __call__(self) -> None:
        self.kernel[(self.programs,)](**self.args, **self.options(HIP))

    def options(self, hip: bool) -> dict[str, Any]:
        """What it is compiled with; a warp of an AMD GPU of this kind has 64 threads."""
        warps = max(1, self.warps // 2) if hip else self.warps
        most = {"maxnreg": self.registers} if self.registers and not hip else {}
        return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": FP_FUSION, **most}

    def bytes(self) -> int:
        """Each tensor of the call read or written once, the numbers of memory traffic."""
        tensors = (a for a in self.args.values() if isinstance(a, Tensor))
        return sum(a.numel() * a.element_size() for a in tensors)


# The default of this option changes between Triton 3.9 and 3.10, and with it the last bits.
FP_FUSION = True


def launch(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs them in order on the device of their tensors, which need not be the current one."""
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        for one in launches:
            one()


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache(maxsize=4096)
def aligned(numbers: tuple[int, ...]) -> int:
    """The largest of 8, 4, 2 and 1 that divides them all: how many neighbours one load may take."""
    return next(v for v in (8, 4, 2, 1) if all(n % v == 0 for n in numbers))


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def no_device(tensors: Sequence[Tensor | None]) -> str | None:
    """Why Triton cannot run on these tensors, whatever the operation; None where it can."""
    x = tensors[0]
    if not INSTALLED:
        return "the package triton is not installed"
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"{t.dtype} tensors"
    there = {t.device for t in tensors if t is not None}
    if len(there) > 1:
        return f"tensors on several devices, {sorted(map(str, there))}"
    if not (x.is_cuda or x.is_meta or (interpreted() and x.device.type == "cpu")):
        return f"it needs a CUDA device, and the tensors are on {x.device.type}"
    if torch._C._are_functorch_transforms_active():
        return "inside vmap or another torch.func transform"
    return None


def traced(x: Tensor) -> bool:
    """Whether a call is recorded and not run: torch.compile, meta and fake tensors."""
    return torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter)


def differentiated(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def twice(op: str) -> RuntimeError:
    return RuntimeError(
        f"kernels.{op}=triton has no second derivative; use kernels=eager for this run, "
        f"or impl='eager' for this call"
    )


class Once(torch.autograd.Function):
    """Gradients that may be looked at but not differentiated: `create_graph=True` ends here."""

    @staticmethod
    def forward(
        ctx: Any, op: str, compute: Callable[[], tuple[Tensor | None, ...]], *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise twice(ctx.op)


def gradients(
    op: str, compute: Callable[[], tuple[Tensor | None, ...]], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """`compute()`, in a way that a second derivative says what to do instead."""
    if torch.is_grad_enabled():
        return Once.apply(op, compute, *(t for t in inputs if t is not None))
    return compute()
