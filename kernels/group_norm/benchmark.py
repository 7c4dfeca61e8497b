"""Group norm and SiLU at the sizes of published models, against other implementations."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels._benchmark import Call, Case

GROUPS, EPS = 32, 1e-5
# name -> (shape, frames that share statistics)
SIZES = {
    "320 @ 40x64": ((32, 320, 40, 64), 1),
    "320 @ 40x64, 16 frames": ((32, 320, 40, 64), 16),
    "640 @ 40x64": ((32, 640, 40, 64), 1),
    "960 @ 40x64": ((32, 960, 40, 64), 1),
    "640 @ 20x32": ((32, 640, 20, 32), 1),
    "1920 @ 20x32": ((32, 1920, 20, 32), 1),
    "1280 @ 10x16": ((32, 1280, 10, 16), 1),
    "1280 @ 5x8": ((32, 1280, 5, 8), 1),
    "VQ-f4 128 @ 256x256": ((8, 128, 256, 256), 1),
    "video VAE 128 @ 9x480x720": ((1, 128, 9, 480, 720), 1),
}
SMOKE = {"64 @ 4x8": ((4, 64, 4, 8), 1), "64 @ 4x8, 2 frames": ((4, 64, 4, 8), 2)}


def ours(impl: str, frames: int) -> Call:
    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.group_norm(x, GROUPS, w, b, EPS, act="silu", frames=frames, impl=impl)

    return call


def eager(frames: int) -> Call:
    """Computes in x's dtype, with the copies that statistics over frames need."""

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = x
        if frames > 1:
            y = y.unflatten(0, (-1, frames)).transpose(1, 2)
        y = F.group_norm(y, GROUPS, w.to(x.dtype), b.to(x.dtype), EPS)
        if frames > 1:
            y = y.transpose(1, 2).flatten(0, 1)
        return F.silu(y)

    return call


def as_written(frames: int) -> Call:
    """As in published models: norm and SiLU in float32, then a cast back."""
    inner = eager(frames)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return inner(x.float(), w, b).to(x.dtype)

    return call


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")


def liger(frames: int) -> Call:
    function = import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = x.unflatten(0, (-1, frames)).transpose(1, 2) if frames > 1 else x
        n, c = y.shape[:2]
        y = function.apply(y.reshape(n, c, -1), w.to(x.dtype), b.to(x.dtype), c, GROUPS, EPS)
        if frames > 1:
            y = y.unflatten(2, (frames, -1)).transpose(1, 2)
        return F.silu(y.reshape(x.shape))

    return call


def apex(frames: int) -> Call:
    """Supports only channels-last (N, C, H, W)."""
    norm = import_module("apex.contrib.group_norm").GroupNorm
    layers: dict[int, torch.nn.Module] = {}

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if frames > 1 or not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("apex supports only channels last and statistics of one image")
        layer = layers.setdefault(len(w), norm(GROUPS, len(w), EPS, act="silu").to(x.device))
        return torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))

    return call


def cases(smoke: bool = False) -> list[Case]:
    return [
        _case(name, shape, frames, last)
        for name, (shape, frames) in (SMOKE if smoke else SIZES).items()
        for last in ((False, True) if len(shape) == 4 and frames == 1 else (False,))
    ]


def _case(name: str, shape: tuple[int, ...], frames: int, last: bool) -> Case:
    def make(dtype: torch.dtype, seed: int, device: str) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(seed)
        x = torch.randn(shape, generator=g, device=device, dtype=torch.float32).to(dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        affine = [torch.randn(shape[1], generator=g, device=device) for _ in range(2)]
        return tuple(t.requires_grad_() for t in (x, *affine))

    peers = {
        "triton": lambda: ours("triton", frames),
        "auto": lambda: ours("auto", frames),
        "eager, same dtype": lambda: eager(frames),
        "eager, as in models": lambda: as_written(frames),
        "torch.compile, same dtype": lambda: compiled(eager(frames)),
        "torch.compile, as in models": lambda: compiled(as_written(frames)),
        "Liger": lambda: liger(frames),
        "apex": lambda: apex(frames),
    }
    name = f"{name}, channels last" if last else name
    return Case(name, shape, make, ours("reference", frames), peers, 2, 3)
