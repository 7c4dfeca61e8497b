"""Scores generated clips together with reference rows.

Rows: the model; real held-out clips; their first-stage reconstructions (an upper bound for the
model); the metric's baselines (such as the conditional mean clip); the untrained system.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from sandbox.config import registry
from sandbox.config.root import Root
from sandbox.contracts import SAMPLE_TENSORS, Batch, Clip, PairedMetric, PerClipMetric
from sandbox.data.batching import reasons
from sandbox.data.loader import Loader, batches, usual_size
from sandbox.model.autoencoding import psnr, reconstruct_clips
from sandbox.model.components import build_parts
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.reports.progress import Progress

CHUNK = 96  # small clips per sampling batch
THROUGH = 32  # small clips per first-stage batch
PIXELS = 2**20  # maximum per batch over all frames; at least one clip
Watch = Callable[[int, int], object]  # is called with (done, total)


@dataclass
class Evaluation:
    """Scores by row, and the scored clips, (N, 3, T, H, W) in [-1, 1]."""

    scores: dict[str, dict[str, float]]  # {"model": {"colour": 1.0}, "real clips": ...}
    meaning: dict[str, str]  # of each score; both are empty without a metric
    captions: list[str]
    clips: dict[str, Tensor] = field(default_factory=dict)  # by row
    first_stage_psnr: float | None = None  # dB on the real clips; None for cached latents
    count: int = 0
    fps: float | None = None  # of the real clips, if known
    rates: frozenset[str] = frozenset()  # scores that are shares of `count` clips
    each: dict[str, list[float]] = field(default_factory=dict)  # the model's, per clip
    skipped: dict[str, str] = field(default_factory=dict)  # unusable validation clip -> reason


def evaluate(
    system: LatentDiffusion, count: int, untrained: bool = True, watch: Watch | None = None
) -> Evaluation:
    """Samples for the captions of the first `count` validation clips, and scores every row.

    The caller sets eval mode. `watch` is called after each model call and may raise to stop.
    """
    root = system.root
    source = registry.create(root.data)
    metric: Any = None if root.metric is None else registry.create(root.metric)
    real = first_clips(source.split("val"), count, root.seed)
    captions = real.captions or [""] * real.size
    clips = {"model": generate(system, real, watch=watch)}
    ceiling, through = None, _reconstructed(system, real)
    if real.video is not None:
        clips["real clips"] = real.video
        ceiling = psnr(through, real.video).mean().item()
    clips["real through first stage"] = through
    result = Evaluation(
        {}, {}, captions, first_stage_psnr=ceiling, count=real.size, fps=fps_of(real)
    )
    result.skipped = reasons(real.bad)
    floor = {}
    if untrained:
        what = "sampling the untrained model"
        floor["untrained model"] = generate(_untrained(system), real, what, watch=watch)
    if root.metric is not None:
        if wanted := root.metric.fit_clips():
            data = registry.create(root.data.all_clips())
            train = training_clips(data.split("train"), wanted, root.seed)
            metric.fit(train.video, train.captions or [""] * train.size)
        if isinstance(metric, PairedMetric) and real.video is not None:
            metric.set_references(real.video)
        clips |= metric.baselines(captions)
        result.meaning, result.rates = metric.meaning(), metric.proportions()
        result.scores = {
            row: metric.score(video, captions) for row, video in (clips | floor).items()
        }
        if isinstance(metric, PerClipMetric):
            each = metric.per_clip(clips["model"], captions)
            result.each = {name: values.tolist() for name, values in each.items()}
    result.clips = clips | floor
    return result


def paired_metric(root: Root) -> Any:
    """The metric of `root` if it compares clips pairwise with real ones; else None.

    Raises StorageError if its weights are missing.
    """
    cfg = root.metric
    is_paired = cfg and hasattr(registry.plugin_class(cfg.plugin), "set_references")
    return registry.create(cfg) if is_paired else None


def _untrained(system: LatentDiffusion) -> LatentDiffusion:
    fresh = LatentDiffusion(
        system.wiring, build_parts(system.wiring, system.adapter is not None), system.group
    )
    fresh.get_submodule("first_stage").load_state_dict(
        system.get_submodule("first_stage").state_dict()
    )
    if fresh.adapter is not None:
        trained = system.base_state()
        for name, tensor in fresh.base_state().items():
            tensor.copy_(trained[name])
    return fresh.to(system.device).eval()


def generate(
    system: LatentDiffusion,
    like: Batch,
    what: str = "sampling",
    steps: int | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """One clip per caption, image and scalar of `like`, (N, 3, T, H, W) on the CPU.

    The size is that of the clips of `like`, else the first size of the data. `watch` is called
    after each model call.
    """
    calls: int = steps or system.root.sampler.steps
    clip = _size(system, like)
    at_once = _clips_per_batch(clip, CHUNK)
    starts = range(0, like.size, at_once)
    made: list[Tensor] = []
    with Progress(what, len(starts) * calls) as progress:

        def show(step: int, of: int) -> None:
            done = len(made) * calls + step + 1
            progress.update(done)
            if watch:
                watch(done, progress.total)

        for start in starts:
            part = slice_batch(like, start, start + at_once)
            made.append(system.sample(part, clip, steps=calls, progress=show).cpu())
    return torch.cat(made)


def fps_of(batch: Batch) -> float | None:
    """The median fps of the clips; None if unknown."""
    fps = batch.scalars.get("fps")
    return None if fps is None else fps.median().item()


def _clips_per_batch(clip: Clip, most: int) -> int:
    return max(1, min(most, PIXELS // (clip.frames * clip.height * clip.width)))


def _size(system: LatentDiffusion, like: Batch) -> Clip:
    if like.video is not None:
        return Clip(*like.video.shape[1:])
    if like.stored is None:
        return system.wiring.clips[0]
    of_latents = zip(system.wiring.clips, system.wiring.latents, strict=True)
    shape = like.stored.shape[2:]
    return next(c for c, z in of_latents if (z.frames, z.height, z.width) == shape)


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Clips start..stop of a batch, with all their fields."""
    per_clip = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor | list) and k != "bad"}
    scalars = {name: values[start:stop] for name, values in batch.scalars.items()}
    return replace(batch, scalars=scalars, **{k: v[start:stop] for k, v in per_clip.items()})


def first_clips(items: Any, count: int, seed: int) -> Batch:
    """The first `count` clips of a split, or all if it has fewer, as one batch.

    With several sizes, only clips of the most frequent size.
    """
    return _collect(count, batches(items, min(count, 256), seed, usual_size(items, seed)))


def training_clips(items: Any, count: int, seed: int) -> Batch:
    """`count` clips as training sees them, over several epochs of a small split.

    With several sizes, only clips of the most frequent size.
    """
    loader, size = Loader(items, min(count, len(items), 64), seed), usual_size(items, seed)
    stream = chain.from_iterable(repeat(loader))
    of_one_size = (b for b in stream if b.video is None or size in (None, Clip(*b.video.shape[1:])))
    return _collect(count, of_one_size)


def _collect(count: int, stream: Iterable[Batch]) -> Batch:
    """The first `count` clips of a stream as one batch, at positions 0, 1, ..."""
    parts: list[Batch] = []
    for batch in stream:
        parts.append(batch)
        if sum(b.size for b in parts) >= count:
            break
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(b, name) for b in parts])
        for name in SAMPLE_TENSORS
        if getattr(parts[0], name) is not None
    }
    joined = Batch(
        **tensors,
        captions=[c for b in parts for c in b.captions or ()] or None,
        scalars={k: torch.cat([b.scalars[k] for b in parts]) for k in parts[0].scalars},
        ids=[i for b in parts for i in b.ids],
        position=torch.arange(sum(b.size for b in parts)),
        bad=[line for b in parts for line in b.bad],
    )
    return slice_batch(joined, 0, count)


@torch.no_grad()
def reconstruct(first_stage: Any, video: Tensor, device: torch.device) -> Tensor:
    """Reconstructs clips (N, 3, T, H, W) on the CPU with a first stage on `device`; in [-1, 1]."""
    parts = video.split(_clips_per_batch(Clip(*video.shape[1:]), THROUGH))
    made = torch.cat([reconstruct_clips(first_stage, x.to(device)).cpu() for x in parts])
    return made.clamp(-1, 1)


@torch.no_grad()
def _reconstructed(system: LatentDiffusion, real: Batch) -> Tensor:
    """First-stage reconstructions of real clips, from pixels or cached latents."""
    first_stage = system.first_stage
    with system.on_device(first_stage):
        if real.video is not None:
            return reconstruct(first_stage, real.video, system.device)
        assert real.stored is not None  # data provide one of them
        stored = real.stored.split(_clips_per_batch(_size(system, real), THROUGH))
        means = (first_stage.posterior(part.to(system.device)).mean for part in stored)
        made = torch.cat([first_stage.decode(first_stage.scaled(mean)).cpu() for mean in means])
    return made.clamp(-1, 1)
