"""Launch counts and memory traffic, as the READMEs state them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.group_norm import launches as norm
from kernels.temporal_attention import launches as attention

# Statistics and sums add less than 1 % at the sizes below.
SMALL = 1.01


def image(*shape: int, last: bool = False) -> torch.Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return x.to(memory_format=torch.channels_last) if last else x


def norm_work(x: torch.Tensor, frames: int = 1) -> tuple[list, list]:
    weight, bias = (torch.empty(x.shape[1], device="meta") for _ in range(2))
    inputs = norm.Inputs(x, weight, bias, None, None, None)
    options = norm.Options(32, 1e-5, True, frames, False, x.dtype)
    _, mean, rstd, forward = norm.forward(inputs, options)
    needs = norm.Needs(True, True, True, False, False, False)
    _, backward = norm.backward(x, inputs, mean, rstd, options, needs)
    return forward, backward


@pytest.mark.parametrize(
    ("x", "frames", "forward", "backward"),
    [
        (image(32, 320, 40, 64), 1, (1, 4), (2, 6)),  # a group fits into registers
        (image(32, 640, 40, 64), 1, (2, 6), (2, 6)),  # it does not; dx reads again, from the cache
        (image(32, 320, 40, 64), 16, (2, 6), (3, 10)),  # few groups, each split among programs
        (image(32, 320, 40, 64, last=True), 1, (3, 6), (4, 10)),
    ],
    ids=["resident", "large", "frames", "channels last"],
)
def test_group_norm_launches_and_bytes_per_element(x, frames, forward, backward):
    for work, (launches, each) in zip(norm_work(x, frames), (forward, backward), strict=True):
        assert len(work) == launches
        assert each <= sum(one.bytes() for one in work) / x.numel() <= each * SMALL


@pytest.mark.parametrize("biased", [False, True])
def test_attention_moves_four_tensors_and_seven(biased):
    packed = torch.empty(2, 16, 640, 3, 10, 64, dtype=torch.bfloat16, device="meta")
    q, k, v = packed.unbind(3)
    bias = torch.empty(10, 16, 16, device="meta") if biased else None
    _, forward = attention.forward(q, k, v, bias, False, 1.0)
    into = torch.empty_like(packed).unbind(3)
    _, backward = attention.backward(q, q, k, v, bias, False, 1.0, into, False)
    for work, tensors in ((forward, 4), (backward, 7)):
        assert len(work) == 1
        moved = sum(one.bytes() for one in work) / (q.numel() * q.element_size())
        assert tensors <= moved <= tensors * SMALL


def test_attention_reads_an_unbound_projection_without_copies():
    packed = torch.empty(2, 16, 640, 3, 10, 64, dtype=torch.bfloat16, device="meta")
    q, k, v = packed.unbind(3)
    _, (launch,) = attention.forward(q, k, v, None, False, 1.0)
    assert launch.args["q_ptr"] is q and launch.args["q_t"] == 640 * 3 * 10 * 64


def test_all_programs_are_on_the_first_grid_axis():
    q = torch.empty(1, 2, 100_000, 1, 16, device="meta")
    _, (launch,) = attention.forward(q, q, q, None, False, 1.0)
    assert launch.programs == 100_000
