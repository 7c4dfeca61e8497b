"""`temporal_attention` with Triton: supported calls, gradients, and the operators for graphs.

In eager mode an `autograd.Function` launches the kernels directly: a custom operator costs more
host time than a small launch takes on the device. Under torch.compile and on meta and fake tensors,
the call is the custom operator `sandbox_kernels::temporal_attention`, whose CPU implementation is
PyTorch code. The operators repeat the flat signature because torch.library builds their schema from
it.
"""

# no `from __future__ import annotations`: torch.library reads the annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels._launch import (
    MAX_GRID,
    filled,
    gradients,
    is_traced,
    launch,
    needs_grad,
    no_second_derivative,
    refuse_tangents,
    unsupported_tensors,
    zeroed,
)
from kernels.temporal_attention import closed_form, eager, launches

OP = "temporal_attention"
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of q, k, v and bias


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    packed: Tensor | None = None,
) -> str | None:
    """Why Triton cannot run this call; None if it can."""
    b, t, s, h, d = q.shape
    if reason := unsupported_tensors(q, k, v, bias):
        return reason
    if d > launches.MAX_DIM:
        return f"head dim {d} exceeds {launches.MAX_DIM}"
    if t > launches.MAX_FRAMES:
        return f"{t} frames exceed {launches.MAX_FRAMES}"
    if b * s * h > MAX_GRID:
        return f"{b * s * h} sequences exceed the grid size {MAX_GRID}"
    if not torch.compiler.is_compiling() and any(x.stride(4) != 1 and d > 1 for x in (q, k, v)):
        return "a head is not contiguous in memory"
    return None


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    packed: Tensor | None = None,
) -> Tensor:
    """q, k, v (B, T, S, H, D) -> (B, T, S, H*D); `packed`: the tensor they were unbound from."""
    if q.numel() == 0:
        return eager.temporal_attention(q, k, v, bias=bias, causal=causal, scale=scale)
    if is_traced(q):
        return _forward(q, k, v, bias, causal, scale)
    inputs = (q, k, v, None, bias) if packed is None else (None, None, None, packed, bias)
    if needs_grad(inputs):
        return _TemporalAttention.apply(*inputs, causal, scale)
    return _run_forward(q, k, v, bias, causal, scale)


# --- eager mode -----------------------------------------------------------------------------------


class _TemporalAttention(torch.autograd.Function):
    """Takes q, k and v, or `packed` alone, whose gradient is then one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        packed: Tensor | None,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, packed, bias)
        ctx.options = causal, scale
        return _run_forward(*_unpacked(q, k, v, packed), bias, causal, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,) = grad_outputs
        q, k, v, packed, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad

        def compute() -> tuple[Tensor | None, ...]:
            dpacked = _like(packed) if packed is not None and needs[3] else None
            dq, dk, dv = (
                _like(x) if x is not None and n else None
                for x, n in zip((q, k, v), needs, strict=False)
            )
            into = (dq, dk, dv) if dpacked is None else dpacked.unbind(3)
            qkv, (causal, scale) = _unpacked(q, k, v, packed), ctx.options
            dbias = _run_backward(g, *qkv, bias, causal, scale, into, needs[4])
            return dq, dk, dv, dpacked, dbias, None, None

        return gradients(OP, compute, (g, q, k, v, packed, bias))


def _unpacked(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, packed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if packed is not None:
        q, k, v = packed.unbind(3)
    assert q is not None and k is not None and v is not None
    return q, k, v


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    o, work = launches.forward(q, k, v, bias, causal, scale)
    launch(work, q.device)
    return o


def _run_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    into: Sequence[Tensor | None],
    needs_bias: bool,
) -> Tensor | None:
    """Fills `into` (dq, dk, dv) and returns the gradient of the bias.

    The order of additions depends on the shapes alone.
    """
    if not needs_bias and all(x is None for x in into):
        return None
    g = g if g.stride(-1) == 1 or q.shape[4] * q.shape[3] == 1 else g.contiguous()
    g = g.unflatten(3, q.shape[3:])
    part, work = launches.backward(g, q, k, v, bias, causal, scale, into, needs_bias)
    launch(work, q.device)
    if part is None or bias is None:
        return None
    frames = q.shape[1]
    return part.sum(0)[:, :frames, :frames].to(bias.dtype)


# --- custom operators for graphs ------------------------------------------------------------------


@torch.library.custom_op("sandbox_kernels::temporal_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> Tensor:
    if q.numel() == 0:
        return launches.output(q)
    q, k, v = (x if x.stride(4) == 1 else x.contiguous() for x in (q, k, v))
    return _run_forward(q, k, v, bias, causal, scale)


@torch.library.custom_op("sandbox_kernels::temporal_attention_backward", mutates_args=())
def _backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _gradients_like(q, k, v, bias, needs)
    if q.numel() == 0:
        return zeroed(outputs)
    q, k, v = (x if x.stride(4) == 1 else x.contiguous() for x in (q, k, v))
    into = tuple(x if n else None for x, n in zip(outputs, needs[:3], strict=False))
    dbias = _run_backward(g, q, k, v, bias, causal, scale, into, needs[3])
    return (*outputs[:3], outputs[3] if dbias is None else dbias)


@_forward.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    refuse_tangents(q, k, v, bias)
    return eager.temporal_attention(q, k, v, bias=bias, causal=causal, scale=scale)


@_backward.register_kernel("cpu")
def _(g: Tensor, *args: Any) -> Gradients:
    q, k, v, bias, causal, scale, needs = args
    outputs = _gradients_like(q, k, v, bias, needs)
    exact = closed_form.backward(g, q, k, v, bias, causal, scale)
    return filled(outputs, exact, needs)


@_forward.register_fake
def _(q: Tensor, *args: Any) -> Tensor:
    return launches.output(q)


@_backward.register_fake
def _(g: Tensor, *args: Any) -> Gradients:
    q, k, v, bias, _, _, needs = args
    return _gradients_like(q, k, v, bias, needs)


def _gradients_like(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, needs: list[bool]
) -> Gradients:
    """Buffers for dq, dk, dv and dbias; empty tensors for gradients that are not needed."""
    dq, dk, dv, dbias = (
        _like(x) if x is not None and needed else q.new_empty(0)
        for x, needed in zip((q, k, v, bias), needs, strict=True)
    )
    return dq, dk, dv, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, causal, scale = inputs
    ctx.save_for_backward(q, k, v, bias)
    ctx.options = causal, scale


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward(g, q, k, v, bias, *ctx.options, needs)
    return (*(x if n else None for x, n in zip(grads, needs, strict=True)), None, None)


def _backward_of_backward(ctx: Any, *grads: Tensor) -> None:
    raise no_second_derivative(OP)


_forward.register_autograd(_differentiate, setup_context=_setup)
_backward.register_autograd(_backward_of_backward)
