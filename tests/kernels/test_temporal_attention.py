"""Temporal attention: eager against the definition, and independence of positions."""

import pytest
import torch

import kernels
from kernels.temporal_attention import eager

# Rounding of the result's dtype; attention kernels also round their weights, the definition not.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def qkv(b=2, t=5, s=3, h=2, d=8, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(b, t, s, h * d, generator=g).to(dtype).requires_grad_() for _ in range(3)]


def run(impl, inputs, heads, **options):
    """Output and the gradient of q, k, v and bias."""
    q, k, v, *bias = inputs
    given = {"bias": bias[0]} if bias else {}
    out = kernels.temporal_attention(q, k, v, heads=heads, impl=impl, **given, **options)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, seed)]


def check(got, want, tolerance):
    for name, a, b in zip(("out", "q", "k", "v", "bias"), got, want, strict=False):
        error = (a.double() - b.double()).abs().max()
        bound = tolerance * max(1.0, b.double().abs().max())
        assert error <= bound, f"{name}: max error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "s", "h", "d"),
    [(2, 5, 3, 2, 8), (1, 16, 7, 1, 40), (2, 1, 5, 3, 7), (1, 9, 1, 2, 18)],
)
def test_eager_and_every_gradient_equal_the_definition(b, t, s, h, d, causal, biased):
    inputs = qkv(b, t, s, h, d)
    if biased:
        inputs.append(torch.randn(h, t, t, requires_grad=True))
    got, want = (run(impl, inputs, h, causal=causal) for impl in ("eager", "reference"))
    check(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_rounding_of_the_definition(dtype):
    got, want = (run(impl, qkv(dtype=dtype), 2) for impl in ("eager", "reference"))
    assert got[0].dtype == dtype
    check(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_one_packed_projection_can_be_unbound_without_copies(impl):
    packed = torch.randn(2, 4, 3, 3, 2, 8, requires_grad=True)  # (B, T, S, 3, H, D)
    got = kernels.temporal_attention(*packed.unbind(3), heads=2, impl=impl)
    separate = [x.flatten(3).contiguous() for x in packed.unbind(3)]
    want = kernels.temporal_attention(*separate, heads=2, impl="reference")
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


def test_permuting_frames_permutes_the_output():
    inputs, order = qkv(), torch.tensor([3, 0, 4, 1, 2])
    want = kernels.temporal_attention(*inputs, heads=2)[:, order]
    got = kernels.temporal_attention(*(x[:, order] for x in inputs), heads=2)
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


def test_positions_do_not_attend_to_each_other():
    inputs = qkv()
    before = kernels.temporal_attention(*inputs, heads=2)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, :, 1] += 1
    differs = (kernels.temporal_attention(*changed, heads=2) != before).any(-1).any(1).any(0)
    assert differs.tolist() == [False, True, False]


def test_a_causal_frame_does_not_attend_to_later_ones():
    q, k, v = qkv()
    before = kernels.temporal_attention(q, k, v, heads=2, causal=True)
    k, v = k.detach().clone(), v.detach().clone()
    k[:, 3] += 1
    v[:, 3] += 1
    after = kernels.temporal_attention(q, k, v, heads=2, causal=True)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_one_frame_gives_its_value():
    q, k, v = qkv(t=1)
    torch.testing.assert_close(kernels.temporal_attention(q, k, v, heads=2), v, rtol=0, atol=1e-6)


def test_scale_replaces_the_default():
    q, k, v = qkv()
    got = kernels.temporal_attention(q, k, v, heads=2, scale=0.1)
    want = kernels.temporal_attention(q, k, v, heads=2, scale=0.1, impl="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=5e-6)


def test_more_sequences_than_a_grid_axis_holds_run_in_parts(monkeypatch):
    want = kernels.temporal_attention(*qkv(), heads=2)
    monkeypatch.setattr(eager, "MAX_SEQUENCES", 4)
    torch.testing.assert_close(kernels.temporal_attention(*qkv(), heads=2), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("empty", [{"b": 0}, {"s": 0}])
def test_an_empty_input_gives_an_empty_result(impl, empty):
    q, k, v = qkv(**empty)
    assert kernels.temporal_attention(q, k, v, heads=2, impl=impl).shape == q.shape


def test_meta_tensors_give_the_shape():
    q = torch.ones(2, 4, 3, 16, device="meta")
    assert kernels.temporal_attention(q, q, q, heads=2).shape == q.shape


def test_gradients_of_the_definition_are_those_of_finite_differences():
    inputs = [x.detach().double().requires_grad_() for x in qkv(1, 3, 2, 2, 3)]
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias):
        return kernels.temporal_attention(
            q, k, v, heads=2, bias=bias, causal=True, impl="reference"
        )

    assert torch.autograd.gradcheck(call, [*inputs, bias])


def test_it_compiles_in_one_graph():
    q, k, v = qkv()
    compiled = torch.compile(
        lambda *x: kernels.temporal_attention(*x, heads=2) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), kernels.temporal_attention(q, k, v, heads=2) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "q has shape \\(2, 5, 3, 16\\): want .* H=3"),
        ({"k": torch.ones(2, 4, 3, 16)}, "want one shape"),
        ({"v": torch.ones(2, 5, 3, 16).half()}, "want one dtype"),
        ({"bias": torch.ones(2, 5, 4)}, "bias has shape \\(2, 5, 4\\): want \\(2, 5, 5\\)"),
    ],
)
def test_invalid_arguments_are_named(change, message):
    q, k, v = (x.detach() for x in qkv())
    with pytest.raises(ValueError, match=message):
        kernels.temporal_attention(**{"q": q, "k": k, "v": v, "heads": 2} | change)
