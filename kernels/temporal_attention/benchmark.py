"""Temporal attention at the sizes of published models, against other implementations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels._benchmark import Call, Case

SIZES = {  # name -> (B, T, S, H, D)
    "DynamiCrafter 40x64": (2, 16, 2560, 5, 64),
    "DynamiCrafter init_attn": (2, 16, 2560, 8, 64),
    "DynamiCrafter 20x32": (2, 16, 640, 10, 64),
    "DynamiCrafter 10x16": (2, 16, 160, 20, 64),
    "DynamiCrafter 5x8": (2, 16, 40, 20, 64),
    "AnimateDiff 64x64": (2, 16, 4096, 8, 40),
    "AnimateDiff 32x32": (2, 16, 1024, 8, 80),
    "AnimateDiff 16x16": (2, 16, 256, 8, 160),
    "EasyAnimateV2 512": (2, 36, 1024, 8, 144),
    "EasyAnimateV2 768": (2, 36, 2304, 8, 144),
    "stress": (2, 64, 4096, 8, 128),
    "65,535 sequences": (1, 16, 65_535, 1, 64),
    "65,536 sequences": (1, 16, 65_536, 1, 64),
    "100,000 sequences": (1, 16, 100_000, 1, 64),
}
SMOKE = {"small": (2, 4, 6, 2, 16)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "default": None,
}


def ours(impl: str, heads: int) -> Call:
    return lambda q, k, v: kernels.temporal_attention(q, k, v, heads=heads, impl=impl)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in DynamiCrafter: sequences first, scores in memory, then back."""
    b, t, s, h, d = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * s * h, t, d) for x in (q, k, v))
    weights = (torch.einsum("nid,njd->nij", q, k) * d**-0.5).softmax(-1)
    out = torch.einsum("nij,njd->nid", weights, v)
    return out.view(b, s, h, t, d).permute(0, 3, 1, 2, 4).reshape(b, t, s, h * d)


def sdpa(backend: SDPBackend | None, copies: bool) -> Call:
    """scaled_dot_product_attention on (B*S, H, T, D): copied, or a strided view of each clip."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return F.scaled_dot_product_attention(q, k, v)

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, s, h, d = q.shape
        q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * s, h, t, d) for x in (q, k, v))
        out = attend(q, k, v).view(b, s, h, t, d)
        return out.permute(0, 3, 1, 2, 4).reshape(b, t, s, h * d)

    def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        clips = [
            attend(*(x.permute(1, 2, 0, 3) for x in clip)).permute(2, 0, 1, 3).flatten(2)
            for clip in zip(q, k, v, strict=True)
        ]
        return torch.stack(clips)

    return copied if copies else viewed


def flex() -> Call:
    flex_attention = import_module("torch.nn.attention.flex_attention").flex_attention
    attend = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, s, h, d = q.shape
        q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * s, h, t, d) for x in (q, k, v))
        return attend(q, k, v).view(b, s, h, t, d).permute(0, 3, 1, 2, 4).reshape(b, t, s, h * d)

    return call


def xformers() -> Call:
    attend = import_module("xformers.ops").memory_efficient_attention

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t, s, h, d = q.shape
        q, k, v = (x.transpose(1, 2).reshape(b * s, t, h, d) for x in (q, k, v))
        return attend(q, k, v).view(b, s, t, h * d).transpose(1, 2).contiguous()

    return call


def cases(smoke: bool = False) -> list[Case]:
    return [_case(name, shape) for name, shape in (SMOKE if smoke else SIZES).items()]


def _case(name: str, shape: tuple[int, ...]) -> Case:
    heads = shape[3]

    def make(dtype: torch.dtype, seed: int, device: str) -> tuple[Tensor, ...]:
        g = torch.Generator(device).manual_seed(seed)
        qkv = [torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(3)]
        return tuple(t.requires_grad_() for t in qkv)

    peers: dict[str, Callable[[], Call]] = {
        "triton": lambda: ours("triton", heads),
        "auto": lambda: ours("auto", heads),
        "einsum, as in models": lambda: einsum,
        "torch.compile of einsum": lambda: torch.compile(einsum, dynamic=False),
    }
    for key, backend in BACKENDS.items():
        peers[f"permute + SDPA {key}"] = lambda backend=backend: sdpa(backend, True)
        peers[f"strided SDPA {key}"] = lambda backend=backend: sdpa(backend, False)
    peers |= {"FlexAttention": flex, "xformers": xformers}
    return Case(name, shape, make, ours("reference", heads), peers, 4, 7)
