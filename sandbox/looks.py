"""What an image logger shows of a system besides its samples (latent-diffusion, log_images).

Each row is clips (N, 3, T, H, W) in [-1, 1] by column. Callers have set eval mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sandbox import registry
from sandbox.autoencoding import through
from sandbox.contracts import Batch, Hooks
from sandbox.evaluation import gather
from sandbox.latent_diffusion import LatentDiffusion
from sandbox.progress import Progress
from sandbox.sampling import KnownRegion, Quantised

NOISE_LEVELS = 6  # of a diffusion row, the last one included
Row = dict[str, Tensor]


@torch.no_grad()
def looks(system: LatentDiffusion, rows: tuple[str, ...], count: int) -> dict[str, Row]:
    """The asked-for `rows` (names of LOOKS) of `count` held-out clips.

    Those that the system has not are left out: without a codebook nothing is quantised.
    """
    batch = gather(registry.create(system.root.data).split("val"), count, system.root.seed)
    batch = system.transfer_batch_to_device(batch, system.device)
    found = {name: LOOKS[name](system, batch) for name in rows if name in LOOKS}
    shown = {name: row for name, row in found.items() if row}
    return {k: {c: x.clamp(-1, 1).cpu() for c, x in row.items()} for k, row in shown.items()}


def reconstruction(system: LatentDiffusion, batch: Batch) -> Row:
    assert batch.video is not None  # gathered
    return {"input": batch.video, "reconstruction": through(system.first_stage, batch.video)}


def diffusion_row(system: LatentDiffusion, batch: Batch) -> Row:
    """Latents with more and more noise, decoded."""
    draws = system.draws(batch)
    z0, schedule = system.latents(batch, draws), system.schedule
    eps, times = draws.normal("noise", z0), schedule.times(NOISE_LEVELS, "trailing").flip(0)
    row = {"input": batch.video}
    for t in times:
        at = t.to(z0.device).expand(len(z0))
        row[f"t = {t.item():.3g}"] = system.first_stage.decode(schedule.noised(z0, eps, at), draws)
    return row  # type: ignore[return-value]


def samples_x0_quantized(system: LatentDiffusion, batch: Batch) -> Row:
    """Samples whose clean estimates are snapped to the codebook in every step."""
    first_stage = system.first_stage
    if not hasattr(first_stage, "quantize"):
        return {}

    def quantise(z: Tensor) -> Tensor:
        return first_stage.scaled(first_stage.quantize(first_stage.unscaled(z))[0])  # type: ignore[attr-defined]

    return {"sample": _sampled(system, batch, Quantised(quantise), "sampling, quantised")}


def samples_inpainting(system: LatentDiffusion, batch: Batch) -> Row:
    """The middle is made anew."""
    return _filled(system, batch, lambda middle: 1 - middle)


def samples_outpainting(system: LatentDiffusion, batch: Batch) -> Row:
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


def _sampled(system: LatentDiffusion, batch: Batch, hooks: Hooks, what: str) -> Tensor:
    with Progress(what, system.root.sampler.steps) as progress:
        return system.sample(
            batch, hooks=hooks, progress=lambda step, of: progress.update(step + 1)
        )


LOOKS: dict[str, Callable[[LatentDiffusion, Batch], Row]] = {
    "reconstruction": reconstruction,
    "diffusion_row": diffusion_row,
    "samples_x0_quantized": samples_x0_quantized,
    "samples_inpainting": samples_inpainting,
    "samples_outpainting": samples_outpainting,
}
