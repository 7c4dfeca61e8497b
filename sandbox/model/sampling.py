"""Sampling in latent space: a backbone with its conditions, a guidance and a sampler combined."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sandbox.contracts import (
    STUDENT,
    Backbone,
    Conditions,
    Denoised,
    Draws,
    Guidance,
    Hooks,
    Pass,
    Sampler,
    Schedule,
)
from sandbox.model.networks import skipped, with_scalars

pytree.register_dataclass(Conditions)


@torch.no_grad()
def denoise(
    backbone: Backbone,
    schedule: Schedule,
    guidance: Guidance,
    passes: list[tuple[Pass, Conditions]],
    sampler: Sampler,
    z: Tensor,
    steps: int,
    draws: Draws,
    hooks: Hooks | None = None,
    progress: Callable[[int, int], None] | None = None,
    scalars: Mapping[str, float] | None = None,
    guides: Mapping[str, Backbone] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) from standard normal noise `z` of that shape.

    passes: those of `guidance.passes(signals)` with their conditions, in that order. Passes of one
    role that skip the same modules and have tensors of the same shapes run as one batch, others one
    after another. progress(step, steps) is called after each model call; a second-order solver
    makes two per step. scalars: numbers that the network receives besides t, in the unit of t,
    where the sampler does not pass them. guides: other backbones, by the role of the passes that
    use them. The caller sets eval mode.
    """
    order = tuple(p for p, _ in passes)
    cond_of = dict(passes)
    networks = {STUDENT: backbone, **(guides or {})}
    chosen = ChosenNoise(schedule, hooks) if guidance.cfg.chooses_noise() else None

    @cache
    def groups(active: tuple[Pass, ...]) -> list[tuple[list[Pass], Conditions]]:
        return list(batches(active, cond_of))

    def model(
        z_t: Tensor,
        t: Tensor,
        step: int,
        given: Mapping[str, Tensor] | None = None,
        past: Any = None,
    ) -> Tensor:
        z_in, t_in = schedule.inputs(z_t, t)
        own = {name: t.new_full((len(z_t),), x) for name, x in (scalars or {}).items()}
        own |= given or {}
        active = order if past and past.is_writing else guidance.cfg.active(order, step, steps)
        outs = {}
        for group, cond in groups(active):
            n = len(group)
            t_n = t_in.repeat(n, *[1] * (t_in.ndim - 1))
            cond = with_scalars(cond, schedule, z_t, {k: x.repeat(n) for k, x in own.items()})
            if past is not None:
                cond = _of_frames(replace(cond, past=past.of(group)), past.frames, z_t.shape[2])
            network = networks[group[0].role]
            with skipped(network, group[0].skip):
                out = network(z_in.repeat(n, 1, 1, 1, 1), t_n, cond)
            outs |= zip(group, out.chunk(n), strict=True)
        if past and past.is_writing:
            return z_t
        if progress:
            progress(step, steps)
        found = [outs[p] for p in active]
        if chosen is not None:
            chosen.z_t, chosen.raw = z_t, guidance.noise(found, t, step, steps)  # type: ignore[attr-defined]
        return guidance.combine(found, t, step, steps)

    return sampler(model, schedule, z, steps, draws, chosen or hooks)


def _of_frames(cond: Conditions, first: int, count: int) -> Conditions:
    """The conditions of some frames of the video."""
    if cond.concat is None:
        return cond
    return replace(cond, concat=cond.concat[:, :, first : first + count])


def batches(
    passes: Iterable[Pass], cond_of: Mapping[Pass, Conditions]
) -> Iterator[tuple[list[Pass], Conditions]]:
    """The passes that can run as one batch, with their conditions along the batch axis."""
    groups: dict[tuple[str, tuple[str, ...]], list[Pass]] = {}
    for p in passes:
        groups.setdefault((p.role, p.skip), []).append(p)
    for group in groups.values():
        together = concatenate([cond_of[p] for p in group])
        if together is not None:
            yield group, together
        else:
            yield from (([p], cond_of[p]) for p in group)


def concatenate(conditions: list[Conditions]) -> Conditions | None:
    """The passes along the batch axis; None where their tensors differ in name, shape or dtype."""
    if len(conditions) == 1:
        return conditions[0]
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


class ChosenNoise(PlainHooks):
    """Steps add the noise of the output `raw` at `z_t`, which guidance chose; then `hooks`."""

    z_t: Tensor
    raw: Tensor

    def __init__(self, schedule: Schedule, hooks: Hooks | None) -> None:
        self.schedule, self.hooks = schedule, hooks or PlainHooks()

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        return self.hooks.before(z_t, t)

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        eps = self.schedule.denoised(self.raw, self.z_t.to(d.z0.dtype), t).eps
        return self.hooks.denoised(Denoised(d.z0, eps, d.log_variance), t)


class KnownRegion(PlainHooks):
    """Inpainting: sets z_t to the noised known latents where `mask` is 1, before each model call.

    z0 (B, C, T, H, W); mask in [0, 1], broadcastable to z0.
    """

    def __init__(self, schedule: Schedule, z0: Tensor, mask: Tensor, draws: Draws) -> None:
        self.schedule, self.z0, self.mask, self.draws = schedule, z0, mask, draws

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        eps = self.draws.normal(f"known_region_{t[0].tolist()}", self.z0)
        return self.schedule.noised(self.z0, eps, t) * self.mask + (1 - self.mask) * z_t


class Quantised(PlainHooks):
    """Quantises clean estimates with `quantise`: (B, C, T, H, W) -> the same shape.

    As published (LDM): the noise estimate is not recomputed.
    """

    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        self.quantise = quantise

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        return Denoised(self.quantise(d.z0), d.eps, d.log_variance)
