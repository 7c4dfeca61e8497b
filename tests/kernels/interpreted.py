"""The Triton kernels in Triton's interpreter. `test_interpreted.py` runs this in its own process,
because Triton reads TRITON_INTERPRET at import.

Only float32 and float16: the interpreter computes with the bit patterns of bfloat16.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels._launch import interpreted
from kernels.group_norm import launches
from kernels.temporal_attention import launches as attention_launches

assert interpreted(), "started without TRITON_INTERPRET=1"

# Relative L2 error against float64, see the README of each operation.
BAR = {torch.float32: 2e-6, torch.float16: 6e-4}
BAND = 64  # elements before and after each buffer


class Guarded(TorchDispatchMode):
    """Fills every new empty tensor and a band around it with NaN, which reveals missing and
    out-of-bounds writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[tuple[torch.Tensor, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        empty = ("empty.memory_format", "empty_strided", "new_empty", "empty_like", "empty.default")
        if any(name in str(func) for name in empty) and made.is_floating_point():
            return self.guard(made)
        return made

    def guard(self, t: torch.Tensor) -> torch.Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        store = torch.full((size + 2 * BAND,), float("nan"), dtype=t.dtype)
        self.stores.append((store, size))
        return store.as_strided(t.shape, t.stride(), BAND)

    def check(self) -> None:
        assert self.stores, "no buffer was guarded"
        for store, size in self.stores:
            assert store[:BAND].isnan().all() and store[BAND + size :].isnan().all()


def inside(t: torch.Tensor, guarded: Guarded) -> torch.Tensor:
    """A copy of t with the same strides, in a buffer with NaN around and between its elements."""
    return guarded.guard(t).copy_(t)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-3)).item()


@contextmanager
def table(module, **values):
    """Replaces the launch tables by small tiles: few programs, and every loop iterates."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# --- group norm -----------------------------------------------------------------------------------

SPLIT = {
    "RESIDENT": {32: 1}, "STREAM": (64, 1), "PROGRAMS": 16, "MIN_FUSED_GROUPS": 1000,
    "TILES": ((2, 16),), "FINISH": (4, 4), "MERGE_ROWS": 2, "LAST_TILES": ((4, 8),),
}  # fmt: skip
FUSED = SPLIT | {"MIN_FUSED_GROUPS": 0}
EXTRAS = ("pre_shift", "scale", "shift")


def layout(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "frame-major":  # (N, C, T, H, W) as a view of (N*T, C, H, W)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "gaps":  # every second channel of a tensor twice as wide
        return x.repeat_interleave(2, 1)[:, ::2]
    return x


def group_norm_case(
    shape, groups, *, how="first", dtype=torch.float32, act="silu", frames=1, per_frame=False,
    names=("weight", "bias", *EXTRAS), needs=None, offset=0.0, spread=2.0, tiles=None,
    expanded=False, narrow=False,
):  # fmt: skip
    """Compares result and gradients of `needs` (default: all) with the float64 definition."""
    g = torch.Generator().manual_seed(0)
    n, c = shape[:2]
    x = torch.randn(shape, generator=g) * spread + offset
    made = {"x": layout(x.to(dtype), how)}
    for name in names:
        size = (c,) if name in ("weight", "bias") else (n, 2 * c if narrow else c)
        kind = torch.float32 if len(size) == 1 else dtype
        made[name] = torch.randn(size, generator=g).to(kind)[..., :c]
    needs = needs or tuple(made)
    grad = torch.ones(()).expand(shape) if expanded else torch.randn(shape, generator=g)
    options = {"num_groups": groups, "act": act, "frames": frames, "per_frame": per_frame}

    def run(impl, tensors, grad):
        given = {k: v.detach().requires_grad_(k in needs) for k, v in tensors.items()}
        out = kernels.group_norm(**given, **options, impl=impl)
        return out, torch.autograd.grad(out, [given[k] for k in needs], grad.to(out.dtype))

    exact = {k: v.double() for k, v in made.items()}
    want, want_grads = run("reference", exact, grad.to(dtype).double())
    with Guarded() as guarded, table(launches, **(tiles or {})):
        given = {k: inside(v, guarded) for k, v in made.items()}
        got, got_grads = run("triton", given, grad.to(dtype))
    guarded.check()
    assert error(got, want) < BAR[dtype]
    for name, a, b in zip(needs, got_grads, want_grads, strict=True):
        bar = BAR[made[name].dtype] * (2 if name == "pre_shift" else 1)  # its sums cancel
        assert error(a, b) < bar, (name, error(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiles", [None, SPLIT, FUSED], ids=["resident", "split", "fused"])
def test_group_norm_and_every_gradient_are_right(tiles, dtype):
    group_norm_case((2, 8, 5, 8), 4, dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_last_is_right(dtype):
    group_norm_case((2, 12, 5, 7), 4, how="last", dtype=dtype, tiles=SPLIT)


@pytest.mark.parametrize("tiles", [None, SPLIT, FUSED], ids=["resident", "split", "fused"])
@pytest.mark.parametrize("how", ["first", "last"])
def test_three_dimensional_statistics_of_frame_major_images(how, tiles):
    if how == "first" or tiles is SPLIT:
        group_norm_case((4, 6, 3, 5), 2, how=how, frames=2, tiles=tiles)


@pytest.mark.parametrize("how", ["first", "last"])
def test_statistics_of_each_frame_of_a_video(how):
    group_norm_case((2, 6, 3, 2, 4), 2, how=how, per_frame=True, tiles=SPLIT)


@pytest.mark.parametrize("tiles", [None, FUSED], ids=["resident", "fused"])
def test_each_frame_of_a_video_in_one_launch(tiles):
    group_norm_case((2, 6, 3, 2, 4), 2, per_frame=True, tiles=tiles)


@pytest.mark.parametrize("shape", [(3, 7, 9, 7), (1, 6, 63), (2, 6, 3, 3, 3), (2, 8)], ids=str)
def test_odd_sizes_of_three_to_five_dimensions(shape):
    group_norm_case(shape, 2 if shape[1] % 2 == 0 else 1)


def test_one_channel_in_each_group():
    names = ("weight", "bias", "scale", "shift")  # a shift before the norm has no effect here
    group_norm_case((3, 7, 9, 7), 7, names=names)


@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["resident", "split"])
def test_a_clip_that_is_a_view_of_frame_major_images_is_not_copied(tiles):
    group_norm_case((2, 6, 3, 2, 4), 2, how="frame-major", tiles=tiles)


@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["resident", "split"])
@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_a_large_mean_with_a_small_variance_costs_no_precision(offset, tiles):
    # E[x^2] - E[x]^2 has errors of 7e-4 and 1e-2 here; the bound is the rounding of x - mean.
    x = torch.randn(2, 4, 10, 10, generator=torch.Generator().manual_seed(0)) + offset
    with table(launches, **(tiles or {})):
        got = kernels.group_norm(x, 2, impl="triton")
    want = kernels.group_norm(x.double(), 2, impl="reference")
    assert error(got, want) < 1e-7 * offset


@pytest.mark.parametrize("tiles", [None, SPLIT, FUSED], ids=["resident", "split", "fused"])
@pytest.mark.parametrize(
    "needs", [("x",), ("weight",), ("scale", "shift"), ("pre_shift",)], ids=str
)
def test_a_subset_of_gradients(needs, tiles):
    group_norm_case((2, 6, 3, 4), 2, needs=needs, tiles=tiles)


def test_a_subset_of_gradients_with_channels_last():
    for needs in (("x",), ("bias",), ("pre_shift",)):
        group_norm_case((2, 6, 3, 4), 2, how="last", needs=needs, tiles=SPLIT)


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("scale",), ("shift",)], ids=str)
def test_each_optional_tensor_alone(names):
    group_norm_case((2, 6, 3, 4), 2, names=names, act="none")


@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["resident", "split"])
@pytest.mark.parametrize("how", ["first", "last", "gaps"])
def test_strided_input_and_an_expanded_gradient(how, tiles):
    group_norm_case((2, 6, 3, 4), 2, how=how, expanded=True, tiles=tiles)


def test_scale_and_shift_may_be_halves_of_one_tensor():
    group_norm_case((2, 6, 3, 4), 2, narrow=True, tiles=FUSED)


def test_out_dtype_is_the_dtype_of_the_result():
    x = torch.randn(2, 4, 6).half()
    y = kernels.group_norm(x, 2, out_dtype=torch.float32, impl="triton")
    assert y.dtype == torch.float32
    assert error(y, kernels.group_norm(x.double(), 2, impl="reference")) < BAR[torch.float32]


def test_the_result_keeps_the_order_of_axes():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    y = kernels.group_norm(x, 2, impl="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert kernels.group_norm(x[:, :4], 2, impl="triton").stride() == (120, 1, 24, 4)


def test_silu_of_large_numbers_has_a_gradient():
    x = torch.tensor([[[-3.0, 3.0, -1.0, 1.0]]], requires_grad=True)
    out = kernels.group_norm(x, 1, torch.tensor([200.0]), act="silu", impl="triton")
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("tiles", [None, SPLIT], ids=["resident", "split"])
@pytest.mark.parametrize("how", ["first", "last"])
def test_nan_stays_in_its_own_group(how, tiles):
    x = torch.randn(2, 4, 3, 4)
    x[0, 0, 0, 0] = float("nan")
    with table(launches, **(tiles or {})):
        bad = kernels.group_norm(layout(x, how), 2, impl="triton").isnan()
    assert bad[0, :2].all() and bad.sum() == 24


def test_two_runs_are_bitwise_equal():
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    w = torch.randn(6, requires_grad=True)

    def run():
        with table(launches, **SPLIT):
            out = kernels.group_norm(x, 2, w, act="silu", impl="triton")
            return out, *torch.autograd.grad(out.square().sum(), [x, w])

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# --- temporal attention ---------------------------------------------------------------------------


def attention_case(
    b, t, s, h, d, *, dtype=torch.float32, biased=False, causal=False, how="plain", needs="qkvb",
    expanded=False,
):  # fmt: skip
    g = torch.Generator().manual_seed(0)
    if how == "packed":
        q, k, v = torch.randn(b, t, s, 3, h, d, generator=g).to(dtype).unbind(3)
    elif how == "heads first":  # (B, H, T, S, D) seen as (B, T, S, H, D)
        q, k, v = (
            torch.randn(b, h, t, s, d, generator=g).to(dtype).movedim(1, 3) for _ in range(3)
        )
    else:
        q, k, v = (torch.randn(b, t, s, h, d, generator=g).to(dtype) for _ in range(3))
    made = {"q": q, "k": k, "v": v}
    if biased:
        made["bias"] = torch.randn(h, t, t, generator=g).to(dtype)
    wanted = [name for name in made if name[0] in needs]
    grad = (
        torch.ones(()).expand(b, t, s, h * d)
        if expanded
        else torch.randn(b, t, s, h * d, generator=g)
    ).to(dtype)

    def run(impl, tensors, grad):
        given = {k: v.detach().requires_grad_(k in wanted) for k, v in tensors.items()}
        out = kernels.temporal_attention(**given, heads=h, causal=causal, impl=impl)
        return out, torch.autograd.grad(out, [given[k] for k in wanted], grad)

    want, want_grads = run("reference", {k: v.double() for k, v in made.items()}, grad.double())
    with Guarded() as guarded:
        given = {k: inside(v, guarded) for k, v in made.items()}
        got, got_grads = run("triton", given, grad)
    guarded.check()
    assert got.is_contiguous()
    assert error(got, want) < BAR[dtype]
    for name, x, y in zip(wanted, got_grads, want_grads, strict=True):
        assert error(x, y) < BAR[dtype], (name, error(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("biased", "causal"), [(False, False), (True, False), (True, True)])
def test_attention_and_every_gradient_are_right(biased, causal, dtype):
    attention_case(1, 5, 3, 2, 8, dtype=dtype, biased=biased, causal=causal)


@pytest.mark.parametrize("d", [16, 18, 40, 72, 144, 160])
def test_every_kind_of_head_dim(d):
    attention_case(1, 6, 1, 1, d, dtype=torch.float16, causal=True)


@pytest.mark.parametrize(
    ("t", "dtype"),
    [
        (1, torch.float32),
        (17, torch.float32),
        (36, torch.float32),
        (100, torch.float32),
        (100, torch.float16),
    ],
    ids=str,
)
def test_every_padding_of_frames(t, dtype):
    attention_case(1, t, 2, 1, 8, dtype=dtype, causal=True, biased=t == 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_positions_than_one_program_sums_for_the_bias(dtype):
    with table(attention_launches, POSITIONS_FOR_BIAS=2):
        attention_case(2, 3, 5, 2, 8, dtype=dtype, biased=True)


@pytest.mark.parametrize("how", ["packed", "heads first"])
def test_strided_input(how):
    attention_case(2, 4, 3, 2, 8, how=how)


def test_one_tensor_for_all_three_gets_its_gradient_in_one_piece():
    x = torch.randn(2, 4, 3, 3, 2, 8, requires_grad=True)
    out = kernels.temporal_attention(x, heads=2, impl="triton")
    (got,) = torch.autograd.grad(out.square().sum(), x)
    want = kernels.temporal_attention(x, heads=2, impl="reference")
    assert got.is_contiguous()
    assert error(got, torch.autograd.grad(want.square().sum(), x)[0]) < 2 * BAR[torch.float32]


def test_an_expanded_gradient_of_attention():
    attention_case(1, 4, 2, 2, 8, expanded=True)


@pytest.mark.parametrize("needs", ["q", "k", "v", "b", "vb"])
def test_a_subset_of_gradients_of_attention(needs):
    attention_case(1, 4, 2, 2, 8, needs=needs, biased=True)


def test_a_fully_masked_row_gives_zeros_and_no_gradient():
    q, k, v = (torch.randn(1, 3, 2, 1, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 3, 3)
    bias[0, 1] = float("-inf")
    out = kernels.temporal_attention(q, k, v, heads=1, bias=bias, impl="triton")
    assert (out[:, 1] == 0).all() and out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, 1] == 0).all()


def test_nan_stays_at_its_own_position():
    q, k, v = (torch.randn(1, 4, 3, 1, 8) for _ in range(3))
    v[0, 0, 1, 0, 0] = float("nan")
    bad = kernels.temporal_attention(q, k, v, heads=1, impl="triton").isnan()
    assert bad[:, :, 1].any() and not bad[:, :, [0, 2]].any()


# --- both -----------------------------------------------------------------------------------------


def test_a_second_derivative_raises_with_a_fix():
    x = torch.randn(2, 4, 6, requires_grad=True)
    (g,) = torch.autograd.grad(
        kernels.group_norm(x, 2, impl="triton").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative; use kernels=eager"):
        g.sum().backward()


ONES = torch.ones
REJECTED = {
    "float64": lambda: kernels.group_norm(ONES(2, 4, 3).double(), 2, impl="triton"),
    "neither channels first nor": lambda: kernels.group_norm(
        ONES(2, 3, 2, 4, 5).transpose(3, 4), 1, impl="triton"
    ),
    "head dim 161": lambda: kernels.temporal_attention(
        ONES(1, 2, 3, 3, 1, 161), heads=1, impl="triton"
    ),
    "129 frames": lambda: kernels.temporal_attention(
        ONES(1, 129, 1, 3, 1, 8), heads=1, impl="triton"
    ),
    "not contiguous": lambda: kernels.temporal_attention(
        ONES(1, 2, 8, 3, 2, 3).transpose(2, 5), heads=2, impl="triton"
    ),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_an_unsupported_call_raises_its_reason(reason):
    with pytest.raises(ValueError, match=reason):
        REJECTED[reason]()


def test_vmap_is_left_to_eager():
    x = torch.randn(3, 2, 4, 5)
    with kernels.use("triton"):
        got = torch.func.vmap(lambda x: kernels.group_norm(x, 2))(x)
    want = torch.stack([kernels.group_norm(part, 2, impl="eager") for part in x])
    torch.testing.assert_close(got, want)
    assert any("vmap" in reason for reason in kernels.calls()["fallbacks"])


@pytest.mark.parametrize("impl", [None, "triton"])
def test_forward_mode_is_left_to_eager_or_refused(impl):
    """The kernels would drop the tangent."""
    x, v = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    with kernels.use("triton"), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        if impl:
            with pytest.raises(ValueError, match="forward-mode derivatives"):
                kernels.group_norm(dual, 2, impl=impl)
            return
        got, tangent = forward_ad.unpack_dual(kernels.group_norm(dual, 2))
        want, exact = forward_ad.unpack_dual(kernels.group_norm(dual, 2, impl="eager"))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(tangent, exact)
    assert any("forward-mode" in reason for reason in kernels.calls()["fallbacks"])


def test_ten_training_steps_equal_those_of_eager():
    def train(impl):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
        optimizer, data = torch.optim.SGD(net.parameters(), lr=0.1), torch.randn(2, 3, 2, 6)
        losses = []
        with kernels.use(impl):
            for _ in range(10):
                h = net(data)  # (B, T, S, D)
                h = h + kernels.temporal_attention(h, h, h, heads=2)
                h = kernels.group_norm(h.movedim(-1, 1), 2, act="silu")
                loss = h.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    # float32 sums in a different order, over ten steps
    assert train("triton") == pytest.approx(train("eager"), rel=1e-5)
