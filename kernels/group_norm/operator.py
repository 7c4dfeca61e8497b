"""`group_norm` by Triton: what it supports, its gradients, and its form in a graph.

In eager mode an `autograd.Function` launches the kernels directly, since a custom operator costs
more on the host than a small launch on the device. Under torch.compile, on meta and on fake tensors
it is the custom operator `sandbox_kernels::group_norm`, whose CPU form is plain torch.
"""

# no `from __future__ import annotations`: torch.library reads the annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._launch import (
    DTYPES,
    MAX_GRID,
    differentiated,
    gradients,
    launch,
    no_device,
    traced,
    twice,
)
from kernels.group_norm import closed_form, eager, launches
from kernels.group_norm.launches import Needs

OP = "group_norm"
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """The arguments that are no tensors."""

    groups: int
    eps: float
    silu: bool
    frames: int
    per_frame: bool
    out_dtype: torch.dtype


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
    """Why Triton cannot run this call; None where it can."""
    if reason := no_device((x, weight, bias, pre_shift, scale, shift)):
        return reason
    if out_dtype not in DTYPES:
        return f"a result of {out_dtype}"
    if x.numel() > MAX_GRID * x.shape[0]:
        return f"{x.numel() // x.shape[0]} numbers a sample, and it counts them in 31 bits"
    if torch.compiler.is_compiling() or x.numel() == 0:
        return None
    if not _has_rows(x, launches.over_time(x, frames, per_frame, launches.layout)[1]):
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
    """The arguments of `kernels.group_norm`, all of them given and checked."""
    tensors = (x, weight, bias, pre_shift, scale, shift)
    silu = act == "silu"
    if x.numel() == 0:
        return eager.group_norm(
            x, num_groups, weight, bias, eps, act=act, pre_shift=pre_shift, scale=scale,
            shift=shift, frames=frames, per_frame=per_frame, out_dtype=out_dtype,
        )  # fmt: skip
    if traced(x):
        return _forward(*tensors, num_groups, eps, silu, frames, per_frame, out_dtype)[0]
    frames, per_frame = launches.over_time(x, frames, per_frame, launches.layout)
    options = Options(num_groups, eps, silu, frames, per_frame, out_dtype)
    if differentiated(tensors):
        return _GroupNorm.apply(*tensors, options)
    return _run_forward(tensors, options)[0]


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
        tensors = (x, weight, bias, pre_shift, scale, shift)
        y, mean, rstd = _run_forward(tensors, options)
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean, rstd = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:6])

        def compute() -> tuple[Tensor | None, ...]:
            return *_run_backward(g, tensors, mean, rstd, ctx.options, needs), None

        return gradients(OP, compute, (g, *tensors))


def _run_forward(
    tensors: tuple[Tensor | None, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, pre_shift, scale, shift = tensors
    y, mean, rstd, work = launches.forward(
        x, options.groups, weight, bias, options.eps, silu=options.silu, pre_shift=pre_shift,
        scale=scale, shift=shift, frames=options.frames, per_frame=options.per_frame,
        out_dtype=options.out_dtype,
    )  # fmt: skip
    launch(work, x.device)
    return y, mean, rstd


def _run_backward(
    g: Tensor,
    tensors: tuple[Tensor | None, ...],
    mean: Tensor,
    rstd: Tensor,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    x, weight, bias, pre_shift, scale, shift = tensors
    g = launches.matching(g, x, options.per_frame)
    grads, work = launches.backward(
        g, x, mean, rstd, options.groups, weight, bias, silu=options.silu, pre_shift=pre_shift,
        scale=scale, shift=shift, frames=options.frames, per_frame=options.per_frame, needs=needs,
    )  # fmt: skip
    launch(work, x.device)
    return grads


# --- in a graph -----------------------------------------------------------------------------------


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
    if x.numel() == 0:
        return tuple(t.zero_() for t in _outputs(x, groups, frames, per_frame, out_dtype))
    frames, per_frame = launches.over_time(x, frames, per_frame)
    options = Options(groups, eps, silu, frames, per_frame, out_dtype)
    return _run_forward((_rows(x, per_frame), weight, bias, pre_shift, scale, shift), options)


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
    if x.numel() == 0:
        like = _gradients_like(x, weight, bias, pre_shift, scale, shift, frames, per_frame, needs)
        return tuple(t.zero_() for t in like)
    frames, per_frame = launches.over_time(x, frames, per_frame)
    options = Options(groups, eps, silu, frames, per_frame, x.dtype)
    tensors = (_rows(x, per_frame), weight, bias, pre_shift, scale, shift)
    grads = _run_backward(g, tensors, mean, rstd, options, Needs(*needs))
    return tuple(x.new_empty(0) if d is None else d for d in grads)


def _rows(x: Tensor, per_frame: bool) -> Tensor:
    """A graph may bring any strides; where it does, a copy without gaps (as eager makes one)."""
    return x if _has_rows(x, per_frame) else x.contiguous()


@_forward.register_kernel("cpu")
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, pre_shift, scale, shift, groups, eps, silu, frames, per_frame, out_dtype = args
    outputs = _outputs(x, groups, frames, per_frame, out_dtype)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    y = eager.group_norm(
        x, groups, weight, bias, eps, act="silu" if silu else "none", pre_shift=pre_shift,
        scale=scale, shift=shift, frames=frames, per_frame=per_frame, out_dtype=out_dtype,
    )  # fmt: skip
    mean, rstd = closed_form.statistics(x, groups, eps, pre_shift, frames, per_frame)
    for into, value in zip(outputs, (y, mean, rstd), strict=True):
        into.copy_(value)
    return outputs


@_backward.register_kernel("cpu")
def _(g: Tensor, x: Tensor, *args: Any) -> Gradients:
    *parameters, mean, rstd, groups, _, silu, frames, per_frame, needs = args
    outputs = _gradients_like(x, *parameters, frames, per_frame, needs)
    if x.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    weight, bias, pre_shift, scale, shift = parameters
    exact = closed_form.backward(
        g, x, mean, rstd, groups, weight, bias, silu=silu, pre_shift=pre_shift, scale=scale,
        shift=shift, frames=frames, per_frame=per_frame,
    )  # fmt: skip
    for into, value, needed in zip(outputs, exact, needs, strict=True):
        if needed:
            into.copy_(value)
    return outputs


@_forward.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, groups, _, _, frames, per_frame, out_dtype = args
    return _outputs(x, groups, frames, per_frame, out_dtype)


@_backward.register_fake
def _(g: Tensor, x: Tensor, *args: Any) -> Gradients:
    *parameters, _, _, _, _, _, frames, per_frame, needs = args
    return _gradients_like(x, *parameters, frames, per_frame, needs)


def _outputs(
    x: Tensor, groups: int, frames: int, per_frame: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    frames, per_frame = launches.over_time(x, frames, per_frame)
    y = launches.empty_like(x, out_dtype, per_frame)
    return y, *launches.statistics(x, groups, frames, per_frame)


def _gradients_like(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    frames: int,
    per_frame: bool,
    needs: list[bool],
) -> Gradients:
    """Buffers of the gradients; empty ones where none is wanted."""
    _, per_frame = launches.over_time(x, frames, per_frame)
    dx = launches.empty_like(x, x.dtype, per_frame) if needs[0] else x.new_empty(0)
    rest = zip((weight, bias, pre_shift, scale, shift), needs[1:], strict=True)
    return dx, *(p.new_empty(p.shape) if n else x.new_empty(0) for p, n in rest)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.options = Options(*inputs[6:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mean, rstd = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = _backward(g, *tensors, mean, rstd, *ctx.options[:5], needs)
    return *(d if n else None for d, n in zip(grads, needs, strict=True)), *(None,) * 6


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise twice(OP)


_forward.register_autograd(_differentiate, setup_context=_setup)
_backward.register_autograd(_no_second)
