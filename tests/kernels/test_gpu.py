"""The Triton kernels on a GPU, against float64, at the sizes of published models."""

from __future__ import annotations

import pytest
import torch

import kernels

pytestmark = pytest.mark.gpu  # conftest.py skips them without a GPU

# Relative L2 error, see the README of each operation.
BAR = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, device="cuda").to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-9)).item()


def compare(call, made: dict[str, torch.Tensor], summed: tuple[str, ...] = ()) -> None:
    """Checks the output and every gradient against BAR and against 1.5 times eager's error.

    `summed`: gradients that are float32 sums, with cancellation, of values rounded to x's dtype.
    """

    def run(impl: str, wide: bool) -> list[torch.Tensor]:
        given = {k: (v.double() if wide else v).detach().requires_grad_() for k, v in made.items()}
        out = call(impl=impl, **given)
        grad = random(*out.shape, seed=9, dtype=dtype).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, list(given.values()), grad)]

    dtype = next(iter(made.values())).dtype
    want, eager, got = run("reference", True), run("eager", False), run("triton", False)
    for name, w, e, g in zip(("out", *made), want, eager, got, strict=True):
        bar = BAR[dtype] * (4 if name in summed else 1)
        assert g.isfinite().all(), name
        # at least 2/3 of the bar: some eager attention kernels keep their weights in float32
        limit = min(bar, max(1.5 * error(e, w), bar * 2 / 3))
        assert error(g, w) <= limit, (name, error(g, w), error(e, w))


# --- group norm -----------------------------------------------------------------------------------

NORMS = {
    "resident": ((4, 320, 40, 64), 32, {}),
    "three dimensions": ((2, 320, 16, 20, 32), 32, {}),
    "frames": ((32, 640, 10, 16), 32, {"frames": 16}),
    "per frame": ((2, 320, 16, 20, 32), 32, {"per_frame": True}),
    "one large group": ((1, 128, 9, 120, 180), 32, {}),
    "odd": ((3, 7 * 9, 19, 7), 7, {}),
    "small": ((32, 1280, 5, 8), 32, {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", NORMS)
def test_group_norm_and_every_gradient_are_right(name, last, dtype):
    shape, groups, options = NORMS[name]
    n, c = shape[:2]
    x = random(*shape, dtype=dtype) * 2 + 0.5
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    made = {
        "x": x,
        "weight": random(c, seed=1, dtype=dtype),
        "bias": random(c, seed=2, dtype=dtype),
    }
    extras = ("pre_shift", "scale", "shift")
    made |= {k: random(n, c, seed=i, dtype=dtype) for i, k in enumerate(extras, 3)}

    def call(x, weight, bias, impl, **more):
        return kernels.group_norm(x, groups, weight, bias, act="silu", impl=impl, **options, **more)

    compare(call, made, summed=("pre_shift",))


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_a_large_mean_costs_no_precision(offset):
    x = random(2, 64, 64, 64) + offset
    want = kernels.group_norm(x.double(), 2, impl="reference")
    assert error(kernels.group_norm(x, 2, impl="triton"), want) < 1e-7 * offset


def test_more_elements_than_31_bits_can_index():
    shape = (5, 32, 4096, 4096)  # 2.7e9
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB")
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
    full = kernels.group_norm(x, 32, act="silu", impl="triton")[-1:]
    assert torch.equal(full, kernels.group_norm(x[-1:], 32, act="silu", impl="triton"))


# --- temporal attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("t", [1, 16, 36, 64, 100])
@pytest.mark.parametrize("d", [16, 40, 64, 80, 144, 160])
def test_attention_and_every_gradient_are_right(d, t, biased, dtype):
    packed = random(2, t, 40, 3, 4, d, dtype=dtype)
    made = dict(zip("qkv", packed.unbind(3), strict=True))
    if biased:
        made["bias"] = random(4, t, t, seed=1, dtype=dtype)

    def call(q, k, v, impl, bias=None):
        return kernels.temporal_attention(q, k, v, heads=4, bias=bias, causal=biased, impl=impl)

    compare(call, made, summed=("bias",))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_hundred_thousand_sequences(dtype):
    made = dict(zip("qkv", random(1, 16, 100_000, 3, 1, 64, dtype=dtype).unbind(3), strict=True))
    compare(lambda impl, **qkv: kernels.temporal_attention(**qkv, heads=1, impl=impl), made)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_are_bitwise_equal(deterministic):
    def run() -> list[torch.Tensor]:
        x = random(4, 320, 40, 64, dtype=torch.bfloat16).requires_grad_()
        w = random(320, seed=1).requires_grad_()
        y = kernels.group_norm(x, 32, w, act="silu", impl="triton")
        tokens = y.flatten(2).mT.contiguous().view(1, 4, 2560, 320)
        bias = random(5, 4, 4, seed=2, dtype=torch.bfloat16).requires_grad_()
        o = kernels.temporal_attention(tokens, tokens, tokens, heads=5, bias=bias, impl="triton")
        return [o, *torch.autograd.grad(o.float().square().sum(), [x, w, bias])]

    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_runs_the_same_kernels(backend):
    x = random(4, 320, 40, 64, dtype=torch.bfloat16).requires_grad_()

    def call(x):
        h = kernels.group_norm(x, 32, act="silu")
        h = h.flatten(2).mT.contiguous().view(1, 4, 2560, 320)
        return kernels.temporal_attention(h, h, h, heads=5)

    with kernels.use("triton", strict=True):
        want, got = call(x), torch.compile(call, fullgraph=True, backend=backend)(x)
        assert torch.equal(got, want)
        seed = random(*want.shape, seed=9, dtype=want.dtype)
        (a,), (b,) = (torch.autograd.grad(y, x, seed) for y in (got, want))
    assert error(a, b.double()) < BAR[torch.bfloat16]


def test_strict_triton_runs_a_temporal_transformer():
    from plugins._blocks.unet import LayerInputs
    from plugins._blocks.unet_attention import TemporalTransformer

    layer = TemporalTransformer(64, 2, 32).cuda()
    torch.nn.init.normal_(layer.proj_out.weight)
    x = random(8, 64, 5, 7)
    inputs = LayerInputs(random(2, 64), frames=4)
    with torch.no_grad(), kernels.use("reference"):
        want = layer.conditioned(x, inputs)
    with torch.no_grad(), kernels.use("triton", strict=True):
        got = layer.conditioned(x, inputs)
    # the linear layers may use TF32 in both
    assert error(got, want.double()) < 1e-5
