"""Shared code of methods whose network predicts the average velocity of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sandbox.contracts import STUDENT, Conditions, Model, Terms


def average_velocity(
    model: Model, z: Tensor, t: Tensor, step: Tensor, cond: Conditions, role: str = STUDENT
) -> Tensor:
    """The average velocity of a network from t to t - step, as z (B, C, T, H, W); t, step (B,)."""
    return model(z, t, cond, scalars={"step_size": step}, role=role).raw


@torch.no_grad()
def derivative(
    model: Model, z: Tensor, t: Tensor, step: Tensor, cond: Conditions, velocity: Tensor
) -> Tensor:
    """The derivative by t of the average velocity along `velocity` at a fixed end t - step.

    Forward-mode: one Jacobian-vector product with the tangents (velocity, 1, 1) of (z, t, step).
    Returns float32, or float64 for such a network. Raises RuntimeError where the tangent is lost.
    """
    # The fused attention kernels of torch have no forward mode.
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        pairs = (z, velocity.to(z.dtype)), (t, torch.ones_like(t)), (step, torch.ones_like(step))
        z, t, step = (forward_ad.make_dual(x, tangent) for x, tangent in pairs)
        tangent = forward_ad.unpack_dual(average_velocity(model, z, t, step, cond)).tangent
    if tangent is None:
        raise RuntimeError(
            "the derivative of the network is lost: torch computes none in inference mode; "
            "use torch.no_grad"
        )
    return tangent if tangent.dtype == torch.float64 else tangent.float()


def squared_error(out: Tensor, target: Tensor) -> Tensor:
    """(B,) mean over the elements of each sample; float32 at least."""
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.to(wide) - target).square().flatten(1).mean(1)


def terms(error: Tensor, weight: Tensor | None = None) -> Terms:
    """The loss of errors (B,), and their plain mean as "mse" where they have a weight (B,)."""
    if weight is None:
        total = error.mean()
        return Terms(total, error, {"loss": total.detach()})
    total = (weight * error).mean()
    return Terms(total, weight * error, {"loss": total.detach(), "mse": error.detach().mean()})
