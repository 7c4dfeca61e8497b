"""Batches in an order that only (seed, epoch) decides: exact to resume, on any number of processes.

The order of an epoch is a permutation of its clips. A global micro-batch is the next `batch_size *
world` of them, and rank r takes the r-th of `world` equal slices, so that 2 processes of 16 clips
see what 1 process of 32 sees. A clip's own randomness is keyed by (seed, epoch, id); a bad clip is
replaced by one that is keyed by its place. No state of a worker or of a global generator enters,
and the state to save is two numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sandbox.contracts import SAMPLE_TENSORS, SCALARS, BadItem, Batch, DataError, Items, Sample
from sandbox.randomness import keyed
from sandbox.rank import ignore_signals

TRIES = 20  # other items that are tried in the place of a bad one
SHOWN = 5  # bad items that an error names

Bad = dict[str, str]  # id -> reason
Key = tuple[int, int, np.ndarray]  # epoch, position of the first clip, indices


@dataclass
class Order:
    """Where one rank stands in the order of `clips` clips: `taken` micro-batches of `epoch`.

    Iterating gives what is left of the epoch. `stride` is the number of clips in a global
    micro-batch; the last one of an epoch holds what is left, cut to a multiple of `world`.
    """

    seed: int
    clips: int
    stride: int
    rank: int
    world: int
    epoch: int = 0
    taken: int = 0

    def __len__(self) -> int:
        """Micro-batches in a whole epoch."""
        whole, rest = divmod(self.clips, self.stride)
        return whole + (rest >= self.world)

    def __iter__(self) -> Iterator[Key]:
        epoch, taken = self.epoch, self.taken
        order = keyed(self.seed, "order", epoch).permutation(self.clips)
        for first in range(taken * self.stride, len(self) * self.stride, self.stride):
            size = min(self.stride, self.clips - first) // self.world
            first += self.rank * size
            yield epoch, first, order[first : first + size]

    def advance(self) -> None:
        """One micro-batch further; after the last one it is (epoch + 1, 0)."""
        self.taken += 1
        if self.taken == len(self):
            self.epoch, self.taken = self.epoch + 1, 0


class Loader:
    """Micro-batches of one rank; an iterator goes from where the loader stands to the epoch's end.

    The state counts what was handed out, not what workers prepare ahead. Raises DataError (exit
    code 3) without data, with less than one global micro-batch, with more than `max_bad` different
    bad items (counted by each process, in `bad`), and where no good item is found.
    """

    def __init__(
        self,
        items: Items,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        max_bad: int = 100,
    ) -> None:
        _enough(len(items), batch_size, world)
        self.order = Order(seed, len(items), batch_size * world, rank, world)
        self.max_bad = max_bad
        self.bad: Bad = {}
        self._batches = DataLoader(
            _MicroBatches(items, seed),
            sampler=self.order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else the global generator is drawn from
        )

    def __len__(self) -> int:
        """Micro-batches in a whole epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        for batch, bad in self._batches:
            self._count(bad)
            if batch is None:
                raise DataError(f"no usable clip in {TRIES + 1} tries: {_some(bad)}")
            self.order.advance()
            yield batch

    def close(self) -> None:
        """Ends the workers; a later iterator starts others.

        Left to the garbage collector they take five seconds each: it may close the queue that
        tells them to leave before it tells them.
        """
        iterator = self._batches._iterator
        self._batches._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers: where the order stands, its sizes, and the bad items so far."""
        order = self.order
        return {
            "epoch": order.epoch,
            "taken": order.taken,
            "clips": order.clips,
            "stride": order.stride,
            "bad": dict(self.bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the data or the global micro-batch have another size."""
        was, now = (state["clips"], state["stride"]), (self.order.clips, self.order.stride)
        if was != now:
            raise DataError(
                f"the checkpoint has {was[0]} clips in micro-batches of {was[1]} (all processes), "
                f"now there are {now[0]} in {now[1]}: the order would be another. Restore them, or "
                "start anew with resume=never"
            )
        self.order.epoch, self.order.taken = state["epoch"], state["taken"]
        self.bad = dict(state["bad"])

    def _count(self, bad: Bad) -> None:
        self.bad |= bad
        if len(self.bad) > self.max_bad:
            raise DataError(
                f"{len(self.bad)} items are unusable, more than data.max_bad={self.max_bad}: mend "
                f"or remove them, or raise it: {_some(self.bad)}"
            )


def batches(items: Items, batch_size: int, seed: int = 0) -> Iterator[Batch]:
    """Every item once, in the order of the items (epoch 0), for validation and evaluation.

    A bad item is left out and the positions of the others stay; it is named in `bad` of its
    micro-batch, or of a neighbour where that is empty. Raises DataError where no item is usable.
    """
    ready: Batch | None = None  # held back until all that `bad` must name is known
    unsaid: Bad = {}
    for first in range(0, len(items), batch_size):
        indices = np.arange(first, min(first + batch_size, len(items)))
        batch, bad = _micro_batch(items, seed, 0, first, indices, replace=False)
        unsaid |= bad
        if batch is not None:
            if ready is not None:
                yield ready
            batch.bad, unsaid = _lines(unsaid), {}
            ready = batch
    if ready is None:
        reason = f"no clip is usable: {_some(unsaid)}" if unsaid else "there are no clips"
        raise DataError(reason)
    ready.bad += _lines(unsaid)
    yield ready


class _MicroBatches(Dataset):
    """What the workers run: a micro-batch for a key. Bad items come back as data, not as errors."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, key: Key) -> tuple[Batch | None, Bad]:
        epoch, first, indices = key
        batch, bad = _micro_batch(self.items, self.seed, epoch, first, indices, replace=True)
        if batch is not None:
            batch.bad = _lines(bad)
        return batch, bad


def _micro_batch(
    items: Items, seed: int, epoch: int, first: int, indices: np.ndarray, replace: bool
) -> tuple[Batch | None, Bad]:
    """Loads items for the positions from `first` on.

    A bad item is replaced, or left out; no batch where a replacement is not found or nothing is
    left.
    """
    bad: Bad = {}
    loaded: list[tuple[int, str, Sample]] = []
    for position, index in enumerate(indices.tolist(), first):
        for candidate in _candidates(seed, epoch, position, index, len(items) if replace else 0):
            name = items.id(candidate)
            try:
                loaded.append(
                    (position, name, items.load(candidate, keyed(seed, "data", epoch, name)))
                )
                break
            except BadItem as e:
                bad[name] = str(e)
        else:
            if replace:
                return None, bad
    return (_collate(epoch, *zip(*loaded, strict=True)) if loaded else None), bad


def _candidates(seed: int, epoch: int, position: int, index: int, others: int) -> Iterator[int]:
    """The item itself, then what may replace it."""
    yield index
    for attempt in range(TRIES if others else 0):
        yield int(keyed(seed, "replacement", epoch, position, attempt).integers(others))


def _collate(
    epoch: int, positions: tuple[int, ...], ids: tuple[str, ...], samples: tuple[Sample, ...]
) -> Batch:
    first = samples[0]
    tensors: dict[str, Any] = {
        name: torch.stack([s[name] for s in samples]) for name in SAMPLE_TENSORS if name in first
    }
    return Batch(
        **tensors,
        captions=[s["caption"] for s in samples] if "caption" in first else None,
        scalars={
            name: torch.tensor([s[name] for s in samples], dtype=torch.float32)
            for name in sorted(SCALARS.intersection(first))
        },
        ids=list(ids),
        epoch=epoch,
        position=torch.tensor(positions),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _enough(items: int, batch_size: int, world: int) -> None:
    if not items:
        raise DataError("there are no clips to train on")
    if items < batch_size * world:
        processes = f" on {world} processes" if world > 1 else ""
        cure = f"set data.batch_size={items // world}" if items >= world else "add clips"
        raise DataError(
            f"data.batch_size={batch_size}{processes} needs {batch_size * world} clips, there are "
            f"{items}: {cure}"
        )


def _lines(bad: Bad) -> list[str]:
    return [f"{name}: {reason}" for name, reason in bad.items()]


def _some(bad: Bad) -> str:
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(_lines(bad)[:SHOWN]) + more
