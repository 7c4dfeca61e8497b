"""Rows of images of a system besides its samples (latent-diffusion, log_images).

Each row has clips (N, 3, T, H, W) in [-1, 1] by column. Callers set eval mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.contracts import Batch, Denoised, Hooks, SamplerConfig
from sandbox.evaluation.evaluate import first_clips
from sandbox.model.autoencoding import reconstruct_clips
from sandbox.model.latent_diffusion import LatentDiffusion, clip_of
from sandbox.model.sampling import KnownRegion, PlainHooks, Quantised
from sandbox.reports.progress import Progress

NOISE_LEVELS = 6  # shown in a diffusion or progressive row, first and last included
TIMES = 1000  # steps that they are chosen from
Row = dict[str, Tensor]
Chain = SamplerConfig | None


@torch.no_grad()
def image_rows(system: Any, rows: Sequence[str], count: int, chain: Chain = None) -> dict[str, Row]:
    """The requested `rows` (names of ROWS) of `count` held-out clips.

    An Autoencoding only has "reconstruction". Rows that the system does not have are left out:
    without a codebook nothing is quantised. `chain` is the sampler of the progressive row (default:
    the system's); it makes at most as many steps as the schedule has.
    """
    batch = first_clips(registry.create(system.root.data).split("val"), count, system.root.seed)
    batch = system.transfer_batch_to_device(batch, system.device)
    with system.on_device(system.first_stage):
        found = {name: ROWS[name](system, batch, chain) for name in rows if name in ROWS}
    return {
        name: {column: clips.clamp(-1, 1).cpu() for column, clips in row.items()}
        for name, row in found.items()
        if row
    }


def reconstruction(system: Any, batch: Batch, chain: Chain) -> Row:
    video: Any = batch.video  # gathered
    return {"input": video, "reconstruction": reconstruct_clips(system.first_stage, video)}


def diffusion_row(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """Latents with increasing noise, decoded."""
    draws = system.draws(batch)
    z0 = system.latents(batch, draws)
    schedule = system.schedule_for(clip_of(z0))
    eps = draws.normal("noise", z0)
    times = schedule.times(_limit_steps(system, TIMES), "trailing").flip(0)
    row = {"input": batch.video}
    for t in times[_noise_level_indices(len(times))]:
        at = t.to(z0.device).expand(len(z0))
        row[f"t = {t.item():.3g}"] = system.first_stage.decode(schedule.noised(z0, eps, at), draws)
    return row  # type: ignore[return-value]


def _limit_steps(system: LatentDiffusion, steps: int) -> int:
    """`steps`, at most those of the schedule."""
    return min(steps, getattr(system.root.schedule, "timesteps", steps))


def _noise_level_indices(count: int) -> list[int]:
    """At most NOISE_LEVELS of the indices 0 to count - 1, evenly spaced, ends included."""
    places = torch.linspace(0, count - 1, NOISE_LEVELS, dtype=torch.float64)
    return sorted({round(x) for x in places.tolist()})


class Estimates(PlainHooks):
    """Stores the clean estimates of the calls with these numbers."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count = calls, 0
        self.found: dict[str, Tensor] = {}

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        if self.count in self.calls:
            self.found[f"t = {t[0].item():.3g}"] = d.z0
        self.count += 1
        return d


def progressive_row(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """The model's estimates of the clean sample during sampling, and the samples."""
    sampler = chain or system.root.sampler
    sampler = replace(sampler, steps=_limit_steps(system, sampler.steps))
    hooks = Estimates(set(_noise_level_indices(sampler.steps)))
    made = _sampled(system, batch, hooks, "sampling step by step", sampler)
    decode, draws = system.first_stage.decode, system.draws(batch)
    return {name: decode(z, draws) for name, z in hooks.found.items()} | {"sample": made}


def samples_x0_quantized(system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """Samples with the clean estimate quantised to the codebook in every step."""
    stage: Any = system.first_stage
    if not hasattr(stage, "quantize"):
        return {}
    hooks = Quantised(lambda z: stage.scaled(stage.quantize(stage.unscaled(z))[0]))
    return {"sample": _sampled(system, batch, hooks, "sampling, quantised")}


def _inpainted(inside: bool, system: LatentDiffusion, batch: Batch, chain: Chain) -> Row:
    """Samples only the middle (`inside`), or everything but the middle, of held-out clips."""
    draws = system.draws(batch)
    z0 = system.latents(batch, draws)
    height, width = z0.shape[-2:]
    middle = z0.new_zeros(1, 1, 1, height, width)
    middle[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    known = 1 - middle if inside else middle
    hooks = KnownRegion(system.schedule, z0, known, draws)
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


ROWS: dict[str, Callable[[LatentDiffusion, Batch, Chain], Row]] = {
    "reconstruction": reconstruction,
    "diffusion_row": diffusion_row,
    "progressive_row": progressive_row,
    "samples_x0_quantized": samples_x0_quantized,
    "samples_inpainting": partial(_inpainted, True),
    "samples_outpainting": partial(
        _inpainted, False
    ),  # the published logger shows inpainting twice
}
