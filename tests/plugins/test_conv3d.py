"""3-D convolution: equal to torch's, and finite where torch's may be NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from plugins._blocks.conv3d import Conv3d
from tests.inputs import leave_nan_behind, tensor

FORMS = [((3, 3, 3), 1), ((3, 3, 3), 2), ((3, 1, 1), 1), ((3, 3, 1), 1), ((1, 3, 3), 1)]
each_form = pytest.mark.parametrize(("kernel", "stride"), FORMS)


def build(cls: type[nn.Conv3d], kernel: tuple[int, int, int], stride: int) -> nn.Conv3d:
    torch.manual_seed(0)
    return cls(32, 32, kernel, stride, tuple(k // 2 for k in kernel))


def gradients(conv: nn.Conv3d, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = conv(x)
    leave_nan_behind()
    return y, *torch.autograd.grad(y.float().square().sum(), (x, conv.weight, conv.bias))


@each_form
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_it_equals_the_convolution_of_torch(kernel, stride, frames):
    x = tensor(2, 32, frames, 4, 6)
    ours, theirs = build(Conv3d, kernel, stride), build(nn.Conv3d, kernel, stride)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@each_form
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_gradients_in_bfloat16_are_finite(kernel, stride, frames):
    conv = build(Conv3d, kernel, stride)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(conv, tensor(2, 32, frames, 4, 6))
    assert all(x.isfinite().all() for x in found)
