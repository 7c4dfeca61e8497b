"""The custom operators, used by torch.compile and on meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

import kernels
from kernels.group_norm import operator as norm
from kernels.temporal_attention import operator as attention

LAST = torch.channels_last
# float32: the operators sum gradients in a different order than autograd
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def random(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def frame_major(x: torch.Tensor) -> torch.Tensor:
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


# name -> (x, frames, per_frame)
IMAGES = {
    "contiguous": lambda: (random(4, 8, 3, 5), 1, False),
    "channels last": lambda: (
        random(4, 8, 3, 5).detach().to(memory_format=LAST).requires_grad_(), 1, False,
    ),
    "channels last 3-D": lambda: (
        random(2, 8, 2, 3, 5).detach().to(memory_format=torch.channels_last_3d).requires_grad_(),
        1, False,
    ),
    "frames": lambda: (random(4, 8, 3, 5), 2, False),
    "per frame": lambda: (random(4, 8, 2, 3, 5), 1, True),
    "a view of frame-major images": lambda: (frame_major(random(4, 8, 2, 3, 5)), 1, False),
    "gaps": lambda: (random(4, 8, 3, 10)[..., ::2].detach().requires_grad_(), 1, False),
    "empty": lambda: (random(0, 8, 3, 5), 1, False),
}  # fmt: skip


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("name", IMAGES)
def test_group_norm_passes_opcheck(name, extras):
    x, frames, per_frame = IMAGES[name]()
    n, c = x.shape[:2]
    tensors = [random(c, seed=1), random(c, seed=2)] if extras else [None, None]
    tensors += [random(n, c, seed=i) if extras else None for i in (3, 4, 5)]
    opcheck(norm._forward, (x, *tensors, 2, 1e-5, extras, frames, per_frame, torch.float32))
    y, mean, rstd = norm._forward(x, *tensors, 2, 1e-5, extras, frames, per_frame, torch.float32)
    plain = [t.detach() if t is not None else None for t in (y, x, *tensors, mean, rstd)]
    needs = [True, *[extras] * 5]
    opcheck(norm._backward, (*plain, 2, 1e-5, extras, frames, per_frame, needs))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("s", [3, 0], ids=["some positions", "none"])
def test_temporal_attention_passes_opcheck(s, biased):
    packed = random(2, 4, s, 3, 2, 8).detach()
    q, k, v = (x.requires_grad_() for x in packed.unbind(3))
    bias = random(2, 4, 4, seed=1) if biased else None
    opcheck(attention._forward, (q, k, v, bias, True, 0.3))
    g = random(2, 4, s, 16, seed=2, grad=False)
    plain = [x.detach() for x in (q, k, v)]
    bias = bias.detach() if biased else None
    opcheck(attention._backward, (g, *plain, bias, True, 0.3, [True, True, True, biased]))


def norm_call(x: torch.Tensor, **options) -> torch.Tensor:
    given = {"act": "silu", "pre_shift": None, "scale": None, "shift": None, "frames": 1}
    given |= {"per_frame": False, "out_dtype": torch.float32}
    return norm.group_norm(x, 2, None, None, 1e-5, **given | options)


def attention_call(q: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return attention.temporal_attention(q, q, q, bias=bias, causal=False, scale=0.3)


@pytest.mark.parametrize("name", [n for n in IMAGES if n != "empty"])
def test_a_compiled_group_norm_has_the_gradients_of_eager(name):
    x, frames, per_frame = IMAGES[name]()
    compiled = torch.compile(norm_call, fullgraph=True, backend="aot_eager")
    got = compiled(x, frames=frames, per_frame=per_frame)
    options = {"frames": frames, "per_frame": per_frame, "act": "silu"}
    want = kernels.group_norm(x, 2, **options, impl="eager")
    torch.testing.assert_close(got, want, **CLOSE)
    seed = random(*x.shape, seed=7, grad=False)
    (a,), (b,) = (torch.autograd.grad(y, x, seed) for y in (got, want))
    torch.testing.assert_close(a, b, **CLOSE)


def test_a_compiled_attention_has_the_gradients_of_eager():
    q, bias = random(2, 4, 3, 2, 8), random(2, 4, 4, seed=1)
    got = torch.compile(attention_call, fullgraph=True, backend="aot_eager")(q, bias)
    want = kernels.temporal_attention(q, q, q, heads=2, bias=bias, scale=0.3, impl="eager")
    torch.testing.assert_close(got, want, **CLOSE)
    seed = random(2, 4, 3, 16, seed=7, grad=False)
    for a, b in zip(*(torch.autograd.grad(y, (q, bias), seed) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (norm_call, [(2, 8, s) for s in (5, 6, 7, 9)]),
        (attention_call, [(2, 4, s, 2, 8) for s in (3, 5, 6, 7)]),
        (attention_call, [(2, t, 3, 2, 8) for t in (3, 5, 6, 7)]),
    ],
    ids=["positions of a norm", "positions of attention", "frames"],
)
def test_a_changing_size_recompiles_at_most_once(call, sizes):
    made = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=made)
    for shape in sizes:
        assert compiled(random(*shape, grad=False)).numel() == torch.Size(shape).numel()
    assert made.frame_count <= 2


def test_meta_tensors_give_shape_and_layout():
    x = torch.ones(4, 8, 3, 5, device="meta").to(memory_format=LAST)
    with kernels.use("triton"):
        y = kernels.group_norm(x, 2, out_dtype=torch.bfloat16)
        o = kernels.temporal_attention(torch.ones(2, 4, 3, 3, 2, 8, device="meta"), heads=2)
    assert y.shape == x.shape and y.stride() == x.stride() and y.dtype == torch.bfloat16
    assert o.shape == (2, 4, 3, 16)


def test_a_second_derivative_of_an_operator_raises_with_a_fix():
    x = random(2, 8, 3, 5)
    y = norm._forward(x, *[None] * 5, 2, 1e-5, True, 1, False, torch.float32)[0]
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use kernels=eager"):
        g.sum().backward()


def dual(*shape: int) -> torch.Tensor:
    return forward_ad.make_dual(random(*shape, grad=False), random(*shape, seed=1, grad=False))


@pytest.mark.parametrize("choice", ["auto", "eager", "triton"])
def test_the_forward_derivative_is_that_of_finite_differences(choice):
    """Triton has none, so the call is left to eager. Central differences in float64."""
    with kernels.use(choice), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for f, shape in (
            (lambda x: kernels.group_norm(x, 2, act="silu"), (2, 4, 3, 5)),
            (lambda x: kernels.temporal_attention(x, x.flip(1), x, heads=2), (1, 3, 2, 2, 4)),
        ):
            x, v = (random(*shape, seed=i, grad=False).double() for i in (0, 1))
            with forward_ad.dual_level():
                got = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
            want = (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_custom_operators_refuse_tangents():
    with forward_ad.dual_level():
        x, q = dual(2, 4, 3, 5), dual(1, 3, 2, 2, 4)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives; use kernels=eager"):
            norm._forward(x, *[None] * 5, 2, 1e-5, False, 1, False, torch.float32)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives; use kernels=eager"):
            attention._forward(q, q, q, None, False, 0.5)
        with pytest.raises(RuntimeError, match="no forward-mode derivatives; use kernels=eager"):
            attention._run_forward(q, q, q, None, False, 0.5)
