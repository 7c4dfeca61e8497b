"""Scores of generated clips, each beside what it must be compared with.

Rows: the model; real held-out clips; those through the first stage (the ceiling of any model on it); what the metric
calls a baseline (such as the conditional mean clip); and the same system untrained (the floor).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sandbox import registry
from sandbox.autoencoding import psnr, through
from sandbox.contracts import Batch, ConfigError
from sandbox.data import batches
from sandbox.latent_diffusion import LatentDiffusion
from sandbox.parts import build_parts
from sandbox.progress import Progress

FITTING_CLIPS = 2048  # real training clips that a metric learns from
CHUNK = 96  # clips sampled at a time


@dataclass
class Evaluation:
    """Scores by row, and the clips that were judged, (N, 3, T, H, W) in [-1, 1]."""

    scores: dict[str, dict[str, float]]  # {"model": {"colour": 1.0, ...}, "real clips": ...}; empty without a metric
    meaning: dict[str, str]
    captions: list[str]
    clips: dict[str, Tensor] = field(default_factory=dict)  # by row
    first_stage_psnr: float = float("nan")  # dB, of the real clips through the first stage
    count: int = 0


def evaluate(system: LatentDiffusion, count: int, untrained: bool = True) -> Evaluation:
    """Samples for the first `count` validation clips' captions, and scores them and their baselines."""
    root = system.wiring.root
    source = registry.create(root.data)
    val = source.split("val")
    real = gather(val, min(count, len(val)), root.seed)
    captions = real.captions or [""] * real.size
    clips = {"model": generate(system, real, "sampling")}
    clips["real clips"] = real.video
    clips["real through first stage"] = _through(system, real.video)
    result = Evaluation({}, {}, captions, clips, count=real.size)
    result.first_stage_psnr = psnr(clips["real through first stage"], real.video).mean().item()
    fresh_clips: dict[str, Tensor] = {}
    if untrained:
        fresh = LatentDiffusion(system.wiring, build_parts(system.wiring), system.group).to(system.device)
        fresh.first_stage.load_state_dict(system.first_stage.state_dict())
        fresh.eval()
        fresh_clips["untrained model"] = generate(fresh, real, "sampling the untrained model")
    if root.metric is None:
        clips |= fresh_clips
    else:
        metric = registry.create(root.metric)
        train = gather(source.split("train"), FITTING_CLIPS, root.seed)
        metric.fit(train.video, train.captions)
        clips |= metric.baselines(captions) | fresh_clips
        result.scores = {name: metric.score(video, captions) for name, video in clips.items()}
        result.meaning = metric.meaning()
    return result


def generate(system: LatentDiffusion, like: Batch, what: str) -> Tensor:
    """One clip for each caption, image and scalar of `like`, (N, 3, T, H, W) on the CPU, in chunks."""
    steps = system.wiring.root.sampler.steps
    made = []
    chunks = range(0, like.size, CHUNK)
    with Progress(what, len(chunks) * steps) as progress:
        for i, start in enumerate(chunks):
            part = take(like, start, min(start + CHUNK, like.size))
            shown = lambda done, total, i=i: progress.update(min(i * steps + done, len(chunks) * steps))  # noqa: E731
            made.append(system.sample(part, progress=shown).cpu())
    return torch.cat(made)


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Clips start..stop of a batch, without their pixels' being sampled from: what conditions a sample."""
    cut = slice(start, stop)
    return Batch(
        video=None if batch.video is None else batch.video[cut],
        captions=batch.captions[cut] if batch.captions else None,
        negative=batch.negative[cut] if batch.negative else None,
        image=None if batch.image is None else batch.image[cut],
        scalars={k: v[cut] for k, v in batch.scalars.items()},
        ids=batch.ids[cut],
        epoch=batch.epoch,
        position=None if batch.position is None else batch.position[cut],
    )


def gather(items: object, count: int, seed: int) -> Batch:
    """The first `count` clips of a split as one batch."""
    found: list[Batch] = []
    for batch in batches(items, min(count, 256), seed):
        found.append(batch)
        if sum(b.size for b in found) >= count:
            break
    if not found:
        raise ConfigError("data: the split is empty; there is nothing to evaluate on")
    whole = Batch(
        video=torch.cat([b.video for b in found]),
        captions=[c for b in found for c in b.captions] if found[0].captions else None,
        scalars={k: torch.cat([b.scalars[k] for b in found]) for k in found[0].scalars},
        ids=[i for b in found for i in b.ids],
        position=torch.arange(sum(b.size for b in found)),
    )
    return take(whole, 0, min(count, whole.size))


@torch.no_grad()
def _through(system: LatentDiffusion, video: Tensor) -> Tensor:
    parts = [through(system.first_stage, part.to(system.device)).cpu() for part in video.split(32)]
    return torch.cat(parts).clamp(-1, 1)
