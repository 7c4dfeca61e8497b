"""Compiles every launch that can be selected, for GPUs that are not present. Checks register
spills, shared memory, 16-byte loads and matrix instructions.

A subset always runs; the exhaustive set has all launches. Sizes come from the tables that select
the launches, so a new table entry is compiled too.
"""

from __future__ import annotations

from itertools import chain, product

import pytest
import torch

pytest.importorskip("triton")

from kernels.group_norm import launches as norm
from kernels.temporal_attention import launches as attention
from tests.kernels.compiling import SHARED, TARGETS, compiled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = norm.Needs(*[True] * 6)


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check(launch, target: str, matrix: bool = False, wide: bool = False) -> None:
    made, kernel = compiled(launch, target), launch.kernel.__name__
    about = f"{kernel} on {target}: {made.registers} registers"
    assert made.spills == 0, f"{about}, {made.spills} bytes of stack"
    assert made.shared <= SHARED[target], f"{about}, {made.shared} bytes of shared memory"
    if matrix:
        assert made.matrix > 0, f"{about}, no matrix instruction"
    if wide:
        assert made.wide > 0, f"{about}, no load of 16 bytes"


# --- group norm -----------------------------------------------------------------------------------

# (shape, groups, options): one for each size of RESIDENT, split and fused for each of TILES,
# channels last for each of LAST_TILES; then odd sizes, which load single elements
NORMS = {
    "resident 2048": ((32, 1280, 5, 8), 32, {}),
    "resident 4096": ((32, 640, 10, 16), 32, {}),
    "resident 8192": ((32, 1280, 10, 16), 32, {}),
    "resident 16384": ((32, 640, 20, 32), 32, {}),
    "resident 32768": ((32, 320, 40, 64), 32, {}),
    "resident 32768, frames": ((32, 1280, 5, 8), 32, {"frames": 16}),
    "resident 8192, per frame": ((2, 1280, 16, 10, 16), 32, {"per_frame": True}),
    "split 1": ((8, 32, 256, 256), 32, {}),
    "split 2": ((64, 64, 16, 32), 32, {"frames": 64}),
    "split 4": ((64, 128, 16, 16), 32, {"frames": 64}),
    "split 8": ((64, 256, 8, 16), 32, {"frames": 64}),
    "split 16": ((64, 512, 8, 8), 32, {"frames": 64}),
    "split 32": ((64, 1024, 4, 8), 32, {"frames": 64}),
    "fused 1": ((64, 32, 32, 32), 32, {}),
    "fused 2": ((64, 64, 16, 32), 32, {}),
    "fused 4": ((64, 128, 16, 16), 32, {}),
    "fused 8": ((64, 256, 8, 16), 32, {}),
    "fused 16": ((64, 512, 8, 8), 32, {}),
    "fused 32": ((64, 1024, 4, 8), 32, {}),
    "split 3-D": ((2, 320, 16, 40, 64), 32, {}),
    "last 16": ((32, 16, 40, 64), 4, {"last": True}),
    "last 32": ((32, 32, 40, 64), 8, {"last": True}),
    "last 64": ((32, 320, 40, 64), 32, {"last": True}),
    "last, frames": ((32, 320, 40, 64), 32, {"last": True, "frames": 16}),
    "odd resident": ((3, 7 * 9, 9, 7), 7, {}),
    "odd split": ((3, 7 * 4, 99, 97), 7, {}),
    "odd last": ((3, 7 * 9, 9, 7), 7, {"last": True}),
}
WIDE = [name for name in NORMS if not name.startswith("odd")]


def norm_launches(name: str, dtype: torch.dtype, plain: bool = False) -> tuple[list, list]:
    """Forward and backward launches with every option, or (`plain`) only SiLU and affine."""
    shape, groups, options = NORMS[name]
    n, c, *spatial = shape
    x = empty(n, *spatial, c, dtype=dtype).movedim(-1, 1) if "last" in options else None
    x = empty(*shape, dtype=dtype) if x is None else x
    extras = [None if plain else empty(n, c, dtype=dtype) for _ in range(3)]
    inputs = norm.Inputs(x, empty(c), empty(c), *extras)
    call = norm.Options(groups, 1e-5, True, 1, False, dtype)
    call = call._replace(**{k: v for k, v in options.items() if k != "last"})
    _, mean, rstd, forward = norm.forward(inputs, call)
    needs = ALL._replace(pre_shift=False, scale=False, shift=False) if plain else ALL
    _, backward = norm.backward(x, inputs, mean, rstd, call, needs)
    return forward, backward


def check_norm(name: str, dtype: torch.dtype, target: str, plain: bool = False) -> None:
    forward, backward = norm_launches(name, dtype, plain)
    for launch in (*forward, *backward):
        small = any(part in launch.kernel.__name__ for part in ("merge", "finish"))
        check(launch, target, wide=name in WIDE and not small)


def test_every_table_entry_has_a_case():
    def configurations(kernel: str, *keys: str) -> set:
        return {
            (*(launch.args[k] for k in keys), launch.warps)
            for name in NORMS
            for launch in chain(*norm_launches(name, BF16))
            if launch.kernel.__name__ == f"group_norm_{kernel}_kernel"
        }

    assert configurations("fwd", "BLOCK") == set(norm.RESIDENT.items())
    tiles = {(*tile, norm.TILE_WARPS) for tile in norm.TILES}
    last = {(*tile, norm.LAST_WARPS) for tile in norm.LAST_TILES}
    assert configurations("bwd", "CHANNELS", "POSITIONS") == tiles
    for kernel in ("apply", "bwd_sums", "bwd_dx"):
        assert configurations(kernel, "CHANNELS", "POSITIONS") == tiles | last


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["resident 32768", "split 1", "last 64"])
def test_group_norm_fits_the_gpu(name, target):
    check_norm(name, BF16, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resident 2048", "split 1", "fused 4", "last 64"])
def test_group_norm_without_shifts_and_scales_fits_the_gpu(name):
    check_norm(name, BF16, "sm_90", plain=True)


def test_group_norm_without_an_affine_map_compiles():
    x = empty(32, 1280, 5, 8, dtype=BF16)
    inputs = norm.Inputs(x, *[None] * 5)
    call = norm.Options(32, 1e-5, False, 1, False, BF16)
    _, mean, rstd, forward = norm.forward(inputs, call)
    needs = norm.Needs(True, *[False] * 5)
    _, backward = norm.backward(x, inputs, mean, rstd, call, needs)
    for launch in (*forward, *backward):
        check(launch, "sm_90")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_every_group_norm_fits_every_gpu(name, dtype, target):
    if dtype != FP16 or name in WIDE[:5]:
        check_norm(name, dtype, target)
        check_norm(name, dtype, target, plain=True)


# --- temporal attention ---------------------------------------------------------------------------

DIMS = (16, 18, 40, 64, 72, 80, 128, 144, 160)


def attention_launches(
    frames: int, dim: int, dtype: torch.dtype, target: str, biased: bool, causal: bool
) -> list:
    hip = target == "gfx942"
    q = empty(2, frames, 100, 5, dim, dtype=dtype)
    bias = empty(5, frames, frames, dtype=dtype) if biased else None
    _, forward = attention.forward(q, q, q, bias, causal, 1.0, hip)
    into = tuple(torch.empty_like(q) for _ in range(3))
    _, backward = attention.backward(q, q, q, q, bias, causal, 1.0, into, biased, hip)
    return [*forward, *backward]


def check_attention(frames, dim, dtype, target, biased=False, causal=False) -> None:
    for launch in attention_launches(frames, dim, dtype, target, biased, causal):
        wide = dim % 8 == 0 and dim > 16  # 16 x 16 elements are 8 bytes per thread of 64
        check(launch, target, matrix=True, wide=wide)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("frames", "dim"), [(16, 64), (36, 144)])
def test_attention_fits_the_gpu(frames, dim, target):
    check_attention(frames, dim, BF16, target)


def test_attention_with_a_bias_fits_the_gpu():
    check_attention(16, 40, BF16, "sm_80", biased=True, causal=True)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias and causal"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=str)
@pytest.mark.parametrize("frames", sorted({frames for _, frames in attention.TABLE}))
def test_every_attention_fits_every_gpu(frames, dtype, biased, target):
    for dim in DIMS if dtype != FP16 else (64, 144):
        check_attention(frames, dim, dtype, target, biased, causal=biased)


def test_float32_products_are_exact_or_three_tf32_products():
    """A single TF32 product would keep 11 of 24 bits."""
    for launch in attention_launches(16, 64, FP32, "sm_90", False, False):
        assert launch.args["PRECISION"] == "tf32x3"
    for launch in attention_launches(16, 64, FP32, "gfx942", False, False):
        assert launch.args["PRECISION"] == "ieee"


def test_every_padded_number_of_frames_has_an_entry():
    for itemsize, frames in product((2, 4), range(1, attention.MAX_FRAMES + 1)):
        plan = attention.tile(frames, 64, itemsize)
        assert frames <= plan.frames and (itemsize, plan.frames) in attention.TABLE
