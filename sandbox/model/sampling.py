"""From noise to latents: a backbone with its conditions, a guidance and a sampler, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

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
    """Latents (B, C, T, H, W) from standard normal `z` of that shape.

    conditions: one for each of `guidance.passes(signals)`, in that order. Passes whose tensors all
    have the same shapes run as one batch, others one after another. progress(step, steps) is called
    after each call of the model; a solver of second order calls twice in a step. The caller has set
    the backbone to eval mode.
    """
    together = joined(conditions)

    def model(z_t: Tensor, t: Tensor, step: int) -> Tensor:
        z_in, t_in = schedule.inputs(z_t, t)
        if together is None:
            outs = [backbone(z_in, t_in, cond) for cond in conditions]
        else:
            n = len(conditions)
            outs = list(backbone(z_in.repeat(n, 1, 1, 1, 1), t_in.repeat(n), together).chunk(n))
        if progress:
            progress(step, steps)
        return guidance.combine(outs, t, step, steps)

    return sampler(model, schedule, z, steps, draws, hooks)


def joined(conditions: list[Conditions]) -> Conditions | None:
    """Several passes along the batch; None where their tensors differ in name, shape or dtype."""
    first, *others = [
        {name: (x.shape, x.dtype) for name, x in cond.tensors()} for cond in conditions
    ]
    if any(other != first for other in others):
        return None
    values = {}
    for f in fields(Conditions):
        parts = [getattr(cond, f.name) for cond in conditions]
        if isinstance(parts[0], dict):
            values[f.name] = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        elif parts[0] is not None:
            values[f.name] = torch.cat(parts)
    return Conditions(**values)


class PlainHooks:
    """Hooks that change nothing: a base for those that change one thing."""

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        return z_t

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        return d


class KnownRegion(PlainHooks):
    """Inpainting: before each call z_t is the noised known latents where `mask` is 1.

    z0 (B, C, T, H, W); mask in [0, 1], of a shape that broadcasts to it.
    """

    def __init__(self, schedule: Schedule, z0: Tensor, mask: Tensor, draws: Draws) -> None:
        self.schedule, self.z0, self.mask, self.draws = schedule, z0, mask, draws

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        eps = self.draws.normal(f"known_region_{t[0].item()}", self.z0)
        return self.schedule.noised(self.z0, eps, t) * self.mask + (1 - self.mask) * z_t


class Quantised(PlainHooks):
    """Snaps clean estimates by `quantise`: (B, C, T, H, W) -> the same shape.

    As published (LDM): the noise estimate is left as it was.
    """

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        self.quantise = quantise

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        return Denoised(self.quantise(d.z0), d.eps, d.log_variance)
