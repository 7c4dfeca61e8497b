"""What an image logger shows of a system besides its samples (latent-diffusion, log_images).

Each row is clips (N, 3, T, H, W) in [-1, 1] by column. Callers have set eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.contracts import Batch, Denoised, Hooks, SamplerConfig
from sandbox.evaluation.evaluate import gather
from sandbox.model.autoencoding import through
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.sampling import KnownRegion, PlainHooks, Quantised
from sandbox.reports.progress import Progress

NOISE_LEVELS = 6  # of a diffusion or progressive row, first and last included
TIMES = 1000  # of which those are taken
Row = dict[str, Tensor]
Chain = SamplerConfig | None


@torch.no_grad()
def looks(
    system: LatentDiffusion, rows: tuple[str, ...], count: int, chain: Chain = None
) -> dict[str, Row]:
    """The asked-for `rows` (names of LOOKS) of `count` held-out clips.

    Those that the system has not are left out: without a codebook nothing is quantised. `chain` is
    the sampler of the progressive row, in at most as many steps as the schedule has times; else it
    is that of the system.
    """
    batch = gather(registry.create(system.root.data).split("val"), count, system.root.seed)
    batch = system.transfer_batch_to_device(batch, system.device)
    with system.at_work(system.first_stage):
        found = {name: LOOKS[name](system, batch, chain) for name in rows if name in LOOKS}
    shown = {name: row for name, row in found.items() if row}
    return {k: {c: x.clamp(-1, 1).cpu() for c, x in row.items()} for k, row in shown.items()}


def reconstruction(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    assert batch.video is not None  # gathered
    return {"input": batch.video, "reconstruction": through(system.first_stage, batch.video)}


def diffusion_row(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """Latents with more and more noise, decoded."""
    draws = system.draws(batch)
    z0, schedule = system.latents(batch, draws), system.schedule
    eps = draws.normal("noise", z0)
    times = schedule.times(_most(system, TIMES), "trailing").flip(0)
    row = {"input": batch.video}
    for t in times[_spread(len(times))]:
        at = t.to(z0.device).expand(len(z0))
        row[f"t = {t.item():.3g}"] = system.first_stage.decode(schedule.noised(z0, eps, at), draws)
    return row  # type: ignore[return-value]


def _most(system: LatentDiffusion, steps: int) -> int:
    """`steps`, or as many as the schedule has."""
    return min(steps, getattr(system.root.schedule, "timesteps", steps))


def _spread(count: int) -> list[int]:
    """NOISE_LEVELS of the places 0 to count - 1, ends included; all of fewer."""
    places = torch.linspace(0, count - 1, NOISE_LEVELS, dtype=torch.float64)
    return sorted({round(x) for x in places.tolist()})


class Estimates(PlainHooks):
    """Keeps the clean estimates of some calls, by number."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count = calls, 0
        self.kept: dict[str, Tensor] = {}

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        if self.count in self.calls:
            self.kept[f"t = {t[0].item():.3g}"] = d.z0
        self.count += 1
        return d


def progressive_row(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """What the model takes the samples to be on the way from noise, and the samples."""
    sampler = chain or system.root.sampler
    sampler = replace(sampler, steps=_most(system, sampler.steps))
    hooks = Estimates(set(_spread(sampler.steps)))
    made = _sampled(system, batch, hooks, "sampling step by step", sampler)
    decode, draws = system.first_stage.decode, system.draws(batch)
    return {name: decode(z, draws) for name, z in hooks.kept.items()} | {"sample": made}


def samples_x0_quantized(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """Samples whose clean estimates are snapped to the codebook in every step."""
    first_stage = system.first_stage
    if not hasattr(first_stage, "quantize"):
        return {}

    def quantise(z: Tensor) -> Tensor:
        return first_stage.scaled(first_stage.quantize(first_stage.unscaled(z))[0])  # type: ignore[attr-defined]

    return {"sample": _sampled(system, batch, Quantised(quantise), "sampling, quantised")}


def samples_inpainting(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """The middle is made anew."""
    return _filled(system, batch, lambda middle: 1 - middle)


def samples_outpainting(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """All but the middle is made anew. (The published logger shows inpainting twice.)"""
    return _filled(system, batch, lambda middle: middle)


def _filled(system: LatentDiffusion, batch: Batch, known: Callable[[Tensor], Tensor]) -> Row:
    draws = system.draws(batch)
    z0 = system.latents(batch, draws)
    height, width = z0.shape[-2:]
    middle = z0.new_zeros(1, 1, 1, height, width)
    middle[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    hooks = KnownRegion(system.schedule, z0, known(middle), draws)
    return {"input": batch.video, "filled": _sampled(system, batch, hooks, "filling in")}  # type: ignore[dict-item]


def _sampled(
    system: LatentDiffusion, batch: Batch, hooks: Hooks, what: str, chain: Chain = None
) -> Tensor:
    steps = (chain or system.root.sampler).steps
    with Progress(what, steps) as progress:
        return system.sample(
            batch,
            steps=steps,
            hooks=hooks,
            progress=lambda step, of: progress.update(step + 1),
            sampler=registry.create(chain) if chain else None,
        )


LOOKS: dict[str, Callable[[LatentDiffusion, Batch, Chain], Row]] = {
    "reconstruction": reconstruction,
    "diffusion_row": diffusion_row,
    "progressive_row": progressive_row,
    "samples_x0_quantized": samples_x0_quantized,
    "samples_inpainting": samples_inpainting,
    "samples_outpainting": samples_outpainting,
}
