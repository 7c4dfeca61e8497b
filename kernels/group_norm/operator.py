"""`group_norm` with Triton: supported calls, gradients, and the custom operators for graphs.

In eager mode an `autograd.Function` launches the kernels directly: a custom operator costs more
host time than a small launch takes on the device. Under torch.compile and on meta and fake tensors,
the call is the custom operator `sandbox_kernels::group_norm`, whose CPU implementation is PyTorch
code. The operators repeat the flat signature because torch.library builds their schema from it.
"""

# no `from __future__ import annotations`: torch.library reads the annotations

from typing import Any

import torch
from torch import Tensor

from kernels._launch import (
    DTYPES,
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
from kernels.group_norm import closed_form, eager, launches
from kernels.group_norm.launches import Inputs, Needs, Options

OP = "group_norm"
Outputs = tuple[Tensor, Tensor, Tensor]  # y, mean, 1/std
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # in the order of Inputs


def unsupported(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: str,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frames: int,
    per_frame: bool,
    out_dtype: torch.dtype,
) -> str | None:
    """Why Triton cannot run this call; None if it can."""
    if reason := unsupported_tensors(x, weight, bias, pre_shift, scale, shift):
        return reason
    if out_dtype not in DTYPES:
        return f"{out_dtype} output"
    if x.numel() > MAX_GRID * x.shape[0]:
        return f"{x.numel() // x.shape[0]} elements per sample, more than 31 bits can index"
    if torch.compiler.is_compiling() or x.numel() == 0:
        return None
    if not _has_rows(x, launches.frames_as_rows(x, frames, per_frame, launches.layout)[1]):
        return f"strides {x.stride()} are neither channels first nor channels last"
    return None


def _has_rows(x: Tensor, per_frame: bool) -> bool:
    return launches.layout(tuple(x.shape), x.stride(), per_frame) is not None


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    act: str,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frames: int,
    per_frame: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """`kernels.group_norm` with all arguments given and checked."""
    inputs = Inputs(x, weight, bias, pre_shift, scale, shift)
    options = Options(num_groups, eps, act == "silu", frames, per_frame, out_dtype)
    if x.numel() == 0:
        return _eager(inputs, options)
    if is_traced(x):
        return _forward(*inputs, *options)[0]
    frames, per_frame = launches.frames_as_rows(x, frames, per_frame, launches.layout)
    options = options._replace(frames=frames, per_frame=per_frame)
    if needs_grad(inputs):
        return _GroupNorm.apply(*inputs, options)
    return _run_forward(inputs, options)[0]


def _eager(inputs: Inputs, options: Options) -> Tensor:
    return eager.group_norm(
        inputs.x, options.groups, inputs.weight, inputs.bias, options.eps,
        act="silu" if options.silu else "none", pre_shift=inputs.pre_shift, scale=inputs.scale,
        shift=inputs.shift, frames=options.frames, per_frame=options.per_frame,
        out_dtype=options.out_dtype,
    )  # fmt: skip


# --- eager mode -----------------------------------------------------------------------------------


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        pre_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        options: Options,
    ) -> Tensor:
        inputs = Inputs(x, weight, bias, pre_shift, scale, shift)
        y, mean, rstd = _run_forward(inputs, options)
        ctx.save_for_backward(*inputs, mean, rstd)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,) = grad_outputs
        *tensors, mean, rstd = ctx.saved_tensors
        inputs, needs = Inputs(*tensors), Needs(*ctx.needs_input_grad[:6])

        def compute() -> tuple[Tensor | None, ...]:
            return *_run_backward(g, inputs, mean, rstd, ctx.options, needs), None

        return gradients(OP, compute, (g, *inputs))


def _run_forward(inputs: Inputs, options: Options) -> Outputs:
    y, mean, rstd, work = launches.forward(inputs, options)
    launch(work, y.device)
    return y, mean, rstd


def _run_backward(
    g: Tensor, inputs: Inputs, mean: Tensor, rstd: Tensor, options: Options, needs: Needs
) -> list[Tensor | None]:
    g = launches.match_layout(g, inputs.x, options.per_frame)
    grads, work = launches.backward(g, inputs, mean, rstd, options, needs)
    launch(work, g.device)
    return grads


# --- custom operators for graphs ------------------------------------------------------------------


@torch.library.custom_op("sandbox_kernels::group_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    frames: int,
    per_frame: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(x, weight, bias, pre_shift, scale, shift)
    options = Options(groups, eps, silu, frames, per_frame, out_dtype)
    if x.numel() == 0:
        return zeroed(_outputs(x, options))
    return _run_forward(*_with_rows(inputs, options))


@torch.library.custom_op("sandbox_kernels::group_norm_backward", mutates_args=())
def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    frames: int,
    per_frame: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(x, weight, bias, pre_shift, scale, shift)
    options = Options(groups, eps, silu, frames, per_frame, x.dtype)
    if x.numel() == 0:
        return zeroed(_gradients_like(inputs, options, needs))
    inputs, options = _with_rows(inputs, options)
    grads = _run_backward(g, inputs, mean, rstd, options, Needs(*needs))
    dx, dw, db, dpre, dscale, dshift = (x.new_empty(0) if d is None else d for d in grads)
    return dx, dw, db, dpre, dscale, dshift


def _with_rows(inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
    """Inputs and options with which x has rows; copies x if its strides do not allow it.

    In a graph, strides are not known when the implementation is selected.
    """
    x = inputs.x
    frames, per_frame = launches.frames_as_rows(x, options.frames, options.per_frame)
    x = x if _has_rows(x, per_frame) else x.contiguous()
    return inputs._replace(x=x), options._replace(frames=frames, per_frame=per_frame)


@_forward.register_kernel("cpu")
def _(x: Tensor, *args: Any) -> Outputs:
    refuse_tangents(x, *args)
    inputs, options = Inputs(x, *args[:5]), Options(*args[5:])
    outputs = _outputs(x, options)
    if x.numel() == 0:
        return zeroed(outputs)
    values = _eager(inputs, options), *closed_form.statistics(inputs, options)
    return filled(outputs, values, [True] * 3)


@_backward.register_kernel("cpu")
def _(g: Tensor, x: Tensor, *args: Any) -> Gradients:
    *parameters, mean, rstd, groups, eps, silu, frames, per_frame, needs = args
    inputs, options = Inputs(x, *parameters), Options(groups, eps, silu, frames, per_frame, x.dtype)
    outputs = _gradients_like(inputs, options, needs)
    if x.numel() == 0:
        return zeroed(outputs)
    exact = closed_form.backward(g, inputs, mean, rstd, options)
    return filled(outputs, exact, needs)


@_forward.register_fake
def _(x: Tensor, *args: Any) -> Outputs:
    return _outputs(x, Options(*args[5:]))


@_backward.register_fake
def _(g: Tensor, x: Tensor, *args: Any) -> Gradients:
    *parameters, _, _, groups, eps, silu, frames, per_frame, needs = args
    options = Options(groups, eps, silu, frames, per_frame, x.dtype)
    return _gradients_like(Inputs(x, *parameters), options, needs)


def _outputs(x: Tensor, options: Options) -> Outputs:
    frames, per_frame = launches.frames_as_rows(x, options.frames, options.per_frame)
    y = launches.empty_like(x, options.out_dtype, per_frame)
    return y, *launches.statistics(x, options.groups, frames, per_frame)


def _gradients_like(inputs: Inputs, options: Options, needs: list[bool]) -> Gradients:
    """Gradient buffers; empty tensors for gradients that are not needed."""
    x = inputs.x
    _, per_frame = launches.frames_as_rows(x, options.frames, options.per_frame)
    dx = launches.empty_like(x, x.dtype, per_frame) if needs[0] else x.new_empty(0)
    dw, db, dpre, dscale, dshift = (
        x.new_empty(0) if p is None or not needed else p.new_empty(p.shape)
        for p, needed in zip(inputs[1:], needs[1:], strict=True)
    )
    return dx, dw, db, dpre, dscale, dshift


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.options = Options(*inputs[6:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = _backward(g, *tensors, mean, rstd, *ctx.options[:5], needs)
    return *(d if n else None for d, n in zip(grads, needs, strict=True)), *(None,) * 6


def _backward_of_backward(ctx: Any, *grads: Tensor) -> None:
    raise no_second_derivative(OP)


_forward.register_autograd(_differentiate, setup_context=_setup)
_backward.register_autograd(_backward_of_backward)
