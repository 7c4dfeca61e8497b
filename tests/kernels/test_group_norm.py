"""Group normalisation: eager against the definition, and both against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import kernels

# Rounding of the result's dtype; gradients with cancelling terms sum up to 400 such errors.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
EXTRAS = ("pre_shift", "scale", "shift")


def tensors(
    shape, *, affine=True, extras=EXTRAS, dtype=torch.float32, seed=0
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    n, c = shape[:2]
    made = {"x": torch.randn(shape, generator=g) * 2 + 0.5}
    if affine:
        made |= {name: torch.randn(c, generator=g) for name in ("weight", "bias")}
    made |= {name: torch.randn(n, c, generator=g) for name in extras}
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def run(impl, made, groups, **options):
    """Output and the gradient of every tensor."""
    out = kernels.group_norm(num_groups=groups, impl=impl, **made, **options)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    grads = torch.autograd.grad(out, list(made.values()), seed)
    return {"out": out, **dict(zip(made, grads, strict=True))}


def check(got, want, tolerance):
    for name, value in want.items():
        error = (got[name].double() - value.double()).abs().max()
        bound = tolerance * max(1.0, value.double().abs().max())
        assert error <= bound, f"{name}: max error {error:.2e} above {bound:.2e}"


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize(
    ("shape", "groups", "frames"),
    [
        ((2, 8, 5, 8), 4, 1),
        ((3, 7, 9, 7), 7, 1),  # odd, one channel per group
        ((2, 6, 63), 2, 1),
        ((2, 4, 3, 5, 2), 2, 1),  # 3-D statistics
        ((6, 8, 5, 3), 4, 3),  # the same, frame-major
        ((4, 6, 10, 10), 1, 4),
        ((2, 4), 2, 1),
    ],
)
def test_eager_and_every_gradient_equal_the_definition(shape, groups, frames, act):
    made = tensors(shape)
    got, want = (run(impl, made, groups, act=act, frames=frames) for impl in ("eager", "reference"))
    check(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_its_rounding_of_the_definition(dtype):
    made = tensors((2, 8, 5, 7), dtype=dtype)
    got, want = (run(impl, made, 4, act="silu") for impl in ("eager", "reference"))
    assert got["out"].dtype == dtype
    check(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_plain_call_is_torch_group_norm(impl):
    made = tensors((2, 8, 6, 5), extras=())
    out = kernels.group_norm(num_groups=4, impl=impl, **made)
    want = F.group_norm(made["x"], 4, made["weight"], made["bias"])
    torch.testing.assert_close(out, want, rtol=0, atol=5e-6 if impl == "reference" else 0)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_frame_major_equals_statistics_over_three_dimensions(impl):
    made = tensors((6, 8, 5, 4), extras=())
    out = kernels.group_norm(num_groups=2, frames=3, impl=impl, **made)
    video = made["x"].unflatten(0, (2, 3)).transpose(1, 2)  # (B, C, T, H, W)
    want = F.group_norm(video, 2, made["weight"], made["bias"])
    torch.testing.assert_close(out, want.transpose(1, 2).flatten(0, 1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("name", ["weight", "bias", *EXTRAS])
def test_each_optional_tensor_works_alone(name, impl):
    made = tensors((2, 4, 3, 3))
    alone = {k: v for k, v in made.items() if k in ("x", name)}
    neutral = {"weight": torch.ones(4), "bias": torch.zeros(4)}
    neutral |= dict.fromkeys(EXTRAS, torch.zeros(2, 4))
    got = kernels.group_norm(num_groups=2, impl=impl, **alone)
    want = kernels.group_norm(num_groups=2, impl=impl, **neutral | alone)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_strided_input_equals_contiguous_input():
    x = torch.randn(5, 6, 8, 2).permute(3, 2, 0, 1)  # (2, 8, 5, 6), permuted strides
    got = kernels.group_norm(x, 4, act="silu")
    torch.testing.assert_close(got, kernels.group_norm(x.contiguous(), 4, act="silu"))


def test_a_large_offset_costs_no_accuracy():
    # E[x^2] - E[x]^2 would lose every digit: float32 resolves 1e4 to 1e-3.
    x = torch.randn(2, 4, 400, generator=torch.Generator().manual_seed(0)) + 1e4
    want = kernels.group_norm(x.double(), 2, impl="reference")
    torch.testing.assert_close(kernels.group_norm(x, 2).double(), want, rtol=0, atol=2e-3)


def test_nan_stays_in_its_own_group():
    x = torch.randn(2, 4, 5)
    x[0, 0, 0] = float("nan")
    bad = kernels.group_norm(x, 2).isnan()
    assert bad[0, :2].all() and bad.sum() == 10


def test_out_dtype_keeps_the_accuracy_of_float32():
    x = torch.randn(2, 8, 5).bfloat16()
    out = kernels.group_norm(x, 4, out_dtype=torch.float32)
    torch.testing.assert_close(out, F.group_norm(x.float(), 4), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_float32_weights_work_with_half_precision_input(impl):
    made = tensors((2, 8, 5), extras=())
    out = kernels.group_norm(made["x"].bfloat16(), 4, made["weight"], made["bias"], impl=impl)
    assert out.dtype == torch.bfloat16
    want = F.group_norm(made["x"].bfloat16().float(), 4, made["weight"], made["bias"]).bfloat16()
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_an_empty_batch_gives_an_empty_result(impl):
    assert kernels.group_norm(torch.ones(0, 4, 3, 3), 2, frames=2, impl=impl).shape == (0, 4, 3, 3)


def test_meta_tensors_give_the_shape():
    assert kernels.group_norm(torch.ones(4, 4, 3, device="meta"), 2, frames=2).shape == (4, 4, 3)


def test_gradients_of_the_definition_are_those_of_finite_differences():
    made = {k: v.detach().double() for k, v in tensors((4, 4, 3)).items()}
    names = list(made)

    def call(*values):
        given = dict(zip(names, values, strict=True))
        return kernels.group_norm(num_groups=2, act="silu", frames=2, impl="reference", **given)

    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in made.values()])


def test_it_compiles_in_one_graph():
    x = torch.randn(2, 4, 5)
    compiled = torch.compile(
        lambda x: kernels.group_norm(x, 2, act="silu") + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), kernels.group_norm(x, 2, act="silu") + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups=3 does not divide the 4 channels"),
        ({"frames": 4}, "frames=4 does not divide the first axis of x, 6"),
        ({"act": "relu"}, "act='relu': want one of \\['none', 'silu'\\]"),
        ({"weight": torch.ones(6)}, "weight has shape \\(6,\\): want \\(4,\\)"),
        ({"shift": torch.ones(4)}, "shift has shape \\(4,\\): want \\(6, 4\\)"),
        ({"x": torch.ones(4)}, "x has shape \\(4,\\): want \\(N, C, \\*spatial\\)"),
    ],
)
def test_invalid_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.group_norm(**{"x": torch.ones(6, 4, 3), "num_groups": 2} | change)
