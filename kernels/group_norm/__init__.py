"""Group normalisation fused with a shift before it and scale, shift and SiLU after it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._dispatch import load, run

ACTS = ("none", "silu")


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str = "none",
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    frames: int = 1,
    per_frame: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Tensor:
    """act(F.group_norm(x + pre_shift, num_groups, weight, bias, eps) * (1 + scale) + shift).

    Statistics are float32. x is (N, C, *spatial), weight and bias are (C,), pre_shift, scale and
    shift are (N, C); all but x are optional. With `frames` = F, x is frame-major (B*F, C, *spatial)
    and F consecutive frames share statistics, like a spatial axis. With `per_frame`, x is
    (N, C, T, H, W) and each frame has its own statistics. Returns a tensor of x's shape in
    `out_dtype` (default: x's dtype). Raises ValueError for incompatible shapes and for unknown
    `act` and `impl`.
    """
    _check_shapes(x, num_groups, act, frames, per_frame)
    n, c = x.shape[:2]
    for name, value, shape in (
        ("weight", weight, (c,)),
        ("bias", bias, (c,)),
        ("pre_shift", pre_shift, (n, c)),
        ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"group_norm: {name} has shape {tuple(value.shape)}: want {shape}")
    return run(
        "group_norm", impl, x, num_groups, weight, bias, eps, act=act, pre_shift=pre_shift,
        scale=scale, shift=shift, frames=frames, per_frame=per_frame,
        out_dtype=out_dtype or x.dtype,
    )  # fmt: skip


def _check_shapes(x: Tensor, num_groups: int, act: str, frames: int, per_frame: bool) -> None:
    if x.ndim < 2:
        raise ValueError(f"group_norm: x has shape {tuple(x.shape)}: want (N, C, *spatial)")
    n, c = x.shape[:2]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"group_norm: num_groups={num_groups} does not divide the {c} channels")
    if frames < 1 or n % frames:
        raise ValueError(f"group_norm: frames={frames} does not divide the first axis of x, {n}")
    if per_frame and (x.ndim < 3 or frames != 1):
        raise ValueError(
            f"group_norm: per_frame with frames={frames} and x of shape {tuple(x.shape)}: "
            "want frames=1 and (N, C, T, H, W)"
        )
    if act not in ACTS:
        raise ValueError(f"group_norm: act={act!r}: want one of {list(ACTS)}")


load("group_norm")
