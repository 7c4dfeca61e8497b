"""Losses on held-out clips: the training loss, and the denoising loss at fixed, equidistant times.

The loss at fixed times is what Esser et al. 2024 (2403.03206, section 5) compare models by. It does
not depend on how a schedule draws times, nor on how a method trains.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sandbox.config.added_settings import without_added
from sandbox.config.root import to_container
from sandbox.contracts import Batch, Items, Schedule
from sandbox.data.loader import batches
from sandbox.data.randomness import Keyed, seed_of
from sandbox.evaluation.evaluate import slice_batch
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.networks import MicroBatch, Networks
from sandbox.runs.run import Run

BATCH = 64  # most clips of a batch
SEED = 0  # of clips and noise at fixed times, whatever the seed of the run
MEAN = "val_times/mean"


@torch.no_grad()
def training_losses(system: Any, items: Items, count: int) -> dict[str, float]:
    """Mean training loss of `count` clips; other metrics of the loss, over the batches with them.

    Times and noise are drawn as in training, from the seed of the run.
    """
    losses, logs = [], []
    for batch in batches(items, min(count, BATCH), system.root.seed):
        batch = system.transfer_batch_to_device(batch, system.device, 0)
        terms = system.step(batch, system.draws(batch))
        losses.append(terms.per_sample)
        logs.append({k: v * len(terms.per_sample) for k, v in terms.log.items()})
        if sum(map(len, losses)) >= count:
            break
    taken = sum(map(len, losses))
    means = {k: (torch.stack([log[k] for log in logs]).sum() / taken).item() for k in logs[0]}
    return means | {"loss": torch.cat(losses)[:count].mean().item()}


@torch.no_grad()
def losses_at_times(
    system: LatentDiffusion, items: Items, count: int, bins: int
) -> dict[str, float]:
    """Mean denoising loss of `count` clips at the centres of `bins` equal intervals of time.

    Names are those of `time_names`. Clips, latents and noise depend on the id of a clip alone, so
    that losses of two runs are paired; no condition is dropped. The network receives the numbers
    of the method at the values that samplers without them use.
    """
    model, schedule, method = Networks(system), system.schedule, system.root.method
    rows: list[Tensor] = []
    for batch in _first(items, count):
        batch = system.transfer_batch_to_device(batch, system.device, 0)
        draws = draws_of_clips(batch.ids, system.device)
        example = MicroBatch(system, batch, draws)
        z0, conditions = example.z0, example.conditions(frozenset())
        losses = []
        for i, place in enumerate(centres(bins)):
            t, eps = time_at(schedule, place).to(z0.device), draws.normal(f"noise_{i}", z0)
            t = t.expand(len(z0))
            numbers = {name: torch.full_like(t, x) for name, x in method.scalars().items()}
            out = model(schedule.noised(z0, eps, t), t, conditions, scalars=numbers)
            losses.append(model.loss(schedule, out.raw, z0, eps, t).per_sample)
        rows.append(torch.stack(losses, 1).double())  # (B, bins)
    means = torch.cat(rows).mean(0)
    values = [*means.tolist(), means.mean().item()]
    return dict(zip(time_names(bins), values, strict=True))


def _first(items: Items, count: int) -> Iterator[Batch]:
    """The first `count` clips, in batches."""
    for batch in batches(items, min(count, BATCH), SEED):
        yield slice_batch(batch, 0, count)
        count -= batch.size
        if count <= 0:
            return


def draws_of_clips(ids: list[str], device: torch.device) -> Keyed:
    """Draws that depend on the id of a clip alone."""
    keys = torch.tensor([seed_of(SEED, "clip", name) for name in ids], dtype=torch.int64)
    return Keyed(SEED, 0, keys, 1, device)


def centres(bins: int) -> list[float]:
    """The centres of `bins` equal intervals of [0, 1]."""
    return [(i + 0.5) / bins for i in range(bins)]


def time_names(bins: int) -> tuple[str, ...]:
    """Metrics by the time as a fraction of the schedule, and last their mean."""
    return (*(f"val_times/{place:.4f}" for place in centres(bins)), MEAN)


def final_means(run: Run) -> dict[str, float]:
    """The last mean losses at fixed times, by name: of live and EMA weights."""
    rows = [row for row in run.metrics().values() if MEAN in row]
    return {k: v for k, v in rows[-1].items() if k.startswith(MEAN)} if rows else {}


def protocol_at_times(system: LatentDiffusion, count: int, bins: int) -> dict[str, Any]:
    """What losses at fixed times depend on besides the data and the latents.

    Of the schedule these are its noise levels and weights at those times, not how it draws times.
    """
    root, schedule = system.root, system.schedule
    t = torch.stack([time_at(schedule, place) for place in centres(bins)])
    levels = {"alpha": schedule.alpha(t), "sigma": schedule.sigma(t), "weight": schedule.weight(t)}
    rounded = {k: [round(x, 5) for x in v.flatten().tolist()] for k, v in levels.items()}
    loss = without_added(to_container(root.loss))
    return {"clips": count, "loss": loss, "predicts": root.schedule.predicts(), **rounded}


def time_at(schedule: Schedule, place: float) -> Tensor:
    """The time () at `place` in [0, 1) of a schedule: 0 is clean, 1 is noise; in its own unit."""
    first = schedule.times(1, "trailing")[0]
    if first.is_floating_point():
        return torch.tensor(place, dtype=torch.float32)
    return torch.tensor(int(place * (int(first) + 1)))  # trailing times start at T - 1
