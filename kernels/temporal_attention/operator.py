"""`temporal_attention` by Triton: what it supports, its gradients, and its form in a graph.

In eager mode an `autograd.Function` launches the kernels directly, since a custom operator costs
more on the host than a small launch on the device. Under torch.compile, on meta and on fake tensors
it is the custom operator `sandbox_kernels::temporal_attention`, whose CPU form is plain torch.
"""

# no `from __future__ import annotations`: torch.library reads the annotations

from typing import Any

import torch
from torch import Tensor

from kernels._launch import (
    MAX_GRID,
    differentiated,
    gradients,
    launch,
    no_device,
    traced,
    twice,
)
from kernels.temporal_attention import closed_form, eager, launches

OP = "temporal_attention"


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
    """Why Triton cannot run this call; None where it can."""
    b, t, s, h, d = q.shape
    if reason := no_device((q, k, v, bias)):
        return reason
    if d > launches.MAX_DIM:
        return f"heads of {d} numbers, and it has registers for {launches.MAX_DIM}"
    if t > launches.MAX_FRAMES:
        return f"{t} frames, and it has registers for {launches.MAX_FRAMES}"
    if b * s * h > MAX_GRID:
        return f"{b * s * h} sequences, and a grid holds {MAX_GRID}"
    if not torch.compiler.is_compiling() and any(x.stride(4) != 1 and d > 1 for x in (q, k, v)):
        return "the numbers of a head are not side by side in memory"
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
    """q, k, v (B, T, S, H, D) -> (B, T, S, H*D); `packed` is what they were unbound from."""
    if q.numel() == 0:
        return eager.temporal_attention(q, k, v, bias=bias, causal=causal, scale=scale)
    if traced(q):
        return _forward(q, k, v, bias, causal, scale)
    inputs = (q, k, v, None, bias) if packed is None else (None, None, None, packed, bias)
    if differentiated(inputs):
        return _TemporalAttention.apply(*inputs, causal, scale)
    return _run_forward(q, k, v, bias, causal, scale)


# --- eager mode -----------------------------------------------------------------------------------


class _TemporalAttention(torch.autograd.Function):
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
        q, k, v = (q, k, v) if packed is None else packed.unbind(3)
        return _run_forward(q, k, v, bias, causal, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, packed, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad

        def compute() -> tuple[Tensor | None, ...]:
            if packed is None:
                into = tuple(
                    _like(x) if n else None for x, n in zip((q, k, v), needs, strict=False)
                )
                whole, parts = None, (q, k, v)
            else:
                whole, parts = _like(packed) if needs[3] else None, packed.unbind(3)
                into = (None, None, None) if whole is None else whole.unbind(3)
            dbias = _run_backward(g, *parts, bias, *ctx.options, into, needs[4])
            given = (None, None, None) if packed is not None else into
            return (*given, whole, dbias, None, None)

        return gradients(OP, compute, (g, q, k, v, packed, bias))


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
    into: tuple[Tensor | None, ...],
    needs_bias: bool,
) -> Tensor | None:
    """The bias's gradient, in an order of addition that depends on shapes alone; fills `into`."""
    if not needs_bias and all(x is None for x in into):
        return None
    g = g if g.stride(-1) == 1 or q.shape[4] * q.shape[3] == 1 else g.contiguous()
    g = g.unflatten(3, q.shape[3:])
    part, work = launches.backward(g, q, k, v, bias, causal, scale, into, needs_bias)
    launch(work, q.device)
    if part is None:
        return None
    frames = q.shape[1]
    return part.sum(0)[:, :frames, :frames].to(bias.dtype)


# --- in a graph -----------------------------------------------------------------------------------


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
        return tuple(x.zero_() for x in outputs)
    q, k, v = (x if x.stride(4) == 1 else x.contiguous() for x in (q, k, v))
    into = tuple(x if n else None for x, n in zip(outputs, needs[:3], strict=False))
    dbias = _run_backward(g, q, k, v, bias, causal, scale, into, needs[3])
    return (*outputs[:3], outputs[3] if dbias is None else dbias)


@_forward.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    return eager.temporal_attention(q, k, v, bias=bias, causal=causal, scale=scale)


@_backward.register_kernel("cpu")
def _(
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
    exact = closed_form.backward(g, q, k, v, bias, causal, scale)
    for into, value, needed in zip(outputs, exact, needs, strict=True):
        if needed:
            into.copy_(value)
    return outputs


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    return launches.output(q)


@_backward.register_fake
def _(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients_like(q, k, v, bias, needs)


def _gradients_like(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of dq, dk, dv and dbias; empty ones where none is wanted."""
    made = [_like(x) if n else x.new_empty(0) for x, n in zip((q, k, v), needs, strict=False)]
    return (*made, _like(bias) if bias is not None and needs[3] else q.new_empty(0))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, bias, causal, scale = inputs
    ctx.save_for_backward(q, k, v, bias)
    ctx.options = causal, scale


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward(g, q, k, v, bias, *ctx.options, needs)
    return (*(x if n else None for x, n in zip(grads, needs, strict=True)), None, None)


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise twice(OP)


_forward.register_autograd(_differentiate, setup_context=_setup)
_backward.register_autograd(_no_second)
