"""Sampling in latent space: a backbone with its conditions, a guidance and a sampler combined."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sandbox.contracts import (
    Backbone,
    Conditions,
    Denoised,
    Draws,
    Guidance,
    Hooks,
    Sampler,
    Schedule,
)

pytree.register_dataclass(Conditions)


@torch.no_grad()
def denoise(
    backbone: Backbone,
    schedule: Schedule,
    guidance: Guidance,
    conditions: list[Conditions],
    sampler: Sampler,
    z: Tensor,
    steps: int,
    draws: Draws,
    hooks: Hooks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) from standard normal noise `z` of that shape.

    conditions: one per entry of `guidance.passes(signals)`, in that order. Passes whose tensors
    all have the same shapes run as one batch, others one after another. progress(step, steps) is
    called after each model call; a second-order solver makes two per step. The caller sets eval
    mode.
    """
    batched = concatenated(conditions)

    def model(z_t: Tensor, t: Tensor, step: int) -> Tensor:
        z_in, t_in = schedule.inputs(z_t, t)
        if batched is None:
            outs = [backbone(z_in, t_in, cond) for cond in conditions]
        else:
            n = len(conditions)
            outs = list(backbone(z_in.repeat(n, 1, 1, 1, 1), t_in.repeat(n), batched).chunk(n))
        if progress:
            progress(step, steps)
        return guidance.combine(outs, t, step, steps)

    return sampler(model, schedule, z, steps, draws, hooks)


def concatenated(conditions: list[Conditions]) -> Conditions | None:
    """The passes along the batch axis; None where their tensors differ in name, shape or dtype."""
    first, *others = [
        {name: (x.shape, x.dtype) for name, x in cond.tensors()} for cond in conditions
    ]
    if any(other != first for other in others):
        return None
    return pytree.tree_map(lambda *xs: None if xs[0] is None else torch.cat(xs), *conditions)


class PlainHooks:
    """Hooks that change nothing: the base class of the others."""

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        return z_t

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        return d


class KnownRegion(PlainHooks):
    """Inpainting: sets z_t to the noised known latents where `mask` is 1, before each model call.

    z0 (B, C, T, H, W); mask in [0, 1], broadcastable to z0.
    """

    def __init__(self, schedule: Schedule, z0: Tensor, mask: Tensor, draws: Draws) -> None:
        self.schedule, self.z0, self.mask, self.draws = schedule, z0, mask, draws

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        eps = self.draws.normal(f"known_region_{t[0].item()}", self.z0)
        return self.schedule.noised(self.z0, eps, t) * self.mask + (1 - self.mask) * z_t


class Quantised(PlainHooks):
    """Quantises clean estimates with `quantise`: (B, C, T, H, W) -> the same shape.

    As published (LDM): the noise estimate is not recomputed.
    """

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        self.quantise = quantise

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        return Denoised(self.quantise(d.z0), d.eps, d.log_variance)
