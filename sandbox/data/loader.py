"""Batches in an order that only (seed, epoch) decides: exact to resume, on any number of processes.

The order of an epoch is a permutation of its clips. A global micro-batch is the next `batch_size *
world` of them, and rank r takes the r-th of `world` equal slices, so that 2 processes of 16 clips
see what 1 process of 32 sees. Where clips have several sizes, each micro-batch has one: the clips
of a size are taken in the order of the permutation, and the micro-batches are shuffled. A clip's
own randomness is keyed by (seed, epoch, id); a bad clip is replaced by one of its size that is
keyed by its place. No state of a worker or of a global generator enters, and the state to save is
two numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from sandbox.contracts import (
    SAMPLE_TENSORS,
    SCALARS,
    SIZES,
    BadItem,
    Batch,
    Bucketed,
    Clip,
    DataError,
    Items,
    Sample,
)
from sandbox.data.randomness import keyed
from sandbox.distributed.rank import ignore_signals

TRIES = 20  # other items that are tried in the place of a bad one
SHOWN = 5  # bad items, or sizes, that an error names

Bad = dict[str, str]  # id -> reason
Key = tuple[int, int, np.ndarray]  # epoch, position of the first clip, indices
Size = Clip | None  # None: the items have one size and do not tell it


class Buckets:
    """The sizes of `items` in the epoch that was asked for last."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items, self.seed = items, seed
        self._epoch, self._sizes = -1, [None]
        self._codes = np.zeros(len(items), np.int32)

    def __call__(self, epoch: int) -> tuple[np.ndarray, Sequence[Size]]:
        """For each item the place of its size in the second; largest number of items first."""
        if isinstance(self.items, Bucketed) and epoch != self._epoch and len(self.items):
            found: dict[Clip, int] = {}
            codes = np.array([self._code(i, epoch, found) for i in range(len(self.items))], int)
            by_number = np.argsort(-np.bincount(codes, minlength=len(found)), kind="stable")
            self._codes = np.argsort(by_number)[codes].astype(np.int32)
            self._sizes = [[*found][i] for i in by_number]
            self._epoch = epoch
        return self._codes, self._sizes

    def _code(self, index: int, epoch: int, found: dict[Clip, int]) -> int:
        rng = keyed(self.seed, "data", epoch, self.items.id(index))
        size = self.items.bucket(index, rng)  # type: ignore[attr-defined]
        return found.setdefault(size, len(found))


@dataclass
class Cut:
    """Indices in an order, cut into batches of one size each: `flat[starts[i] : stops[i]]`.

    `firsts`: how many clips come before each; `codes`: places of their sizes.
    """

    flat: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    codes: np.ndarray
    firsts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.stops - self.starts
        self.firsts = np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self.starts)

    def taken(self, places: np.ndarray) -> Cut:
        """The batches at `places`; `firsts` count these."""
        return Cut(self.flat, self.starts[places], self.stops[places], self.codes[places])


def cut(order: np.ndarray, codes: np.ndarray, lengths: Sequence[int]) -> Cut:
    """Batches of `lengths[code]` clips of one size, the last of each size of what is left.

    `codes` are those of all items. Sorted by the place of their first clip in `order`.
    """
    codes = codes[order]
    by_size = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(lengths))
    ends = np.cumsum(counts)
    spans = list(zip(ends - counts, ends, lengths, strict=True))
    starts = np.concatenate([np.arange(start, end, step) for start, end, step in spans])
    stops = np.concatenate(
        [np.minimum(np.arange(start, end, step) + step, end) for start, end, step in spans]
    )
    found = Cut(order[by_size], starts, stops, codes[by_size[starts]])
    return found.taken(np.argsort(by_size[starts]))


@dataclass
class Order:
    """Where one rank stands in the order of the clips: `taken` micro-batches of `epoch`.

    Iterating gives what is left of the epoch. `batch_of`: clips of a size for one rank; a global
    micro-batch has `world` times as many. The last one of each size in an epoch holds what is left,
    cut to a multiple of `world`, or there is none with `drop_incomplete`. With `turns` there is one
    micro-batch of each size, then the next of each; what other sizes have more is left out.
    """

    buckets: Buckets
    batch_of: Callable[[Size], int]
    rank: int
    world: int
    drop_incomplete: bool = False
    turns: bool = False
    epoch: int = 0
    taken: int = 0
    _planned: tuple[int, Cut, np.ndarray] | None = None  # epoch, all batches, those that are kept

    @property
    def clips(self) -> int:
        return len(self.buckets.items)

    def __len__(self) -> int:
        """Micro-batches in this whole epoch."""
        return len(self._plan(self.epoch)[1])

    def __iter__(self) -> Iterator[Key]:
        epoch, taken = self.epoch, self.taken
        plan, kept = self._plan(epoch)
        for place in kept[taken:]:
            start, stop = plan.starts[place], plan.stops[place]
            size = (stop - start) // self.world
            mine = self.rank * size
            yield (
                epoch,
                int(plan.firsts[place] + mine),
                plan.flat[start + mine : start + mine + size],
            )

    def advance(self) -> None:
        """One micro-batch further; after the last one it is (epoch + 1, 0)."""
        self.taken += 1
        if self.taken == len(self):
            self.epoch, self.taken = self.epoch + 1, 0

    def sizes(self) -> dict[str, list[int]]:
        """{size: [clips, clips of a global micro-batch]} of epoch 0; empty where there is one."""
        codes, sizes = self.buckets(0)
        if len(sizes) == 1:
            return {}
        counts = np.bincount(codes, minlength=len(sizes)).tolist()
        found = zip(sizes, counts, strict=True)
        return {str(size): [n, self.batch_of(size) * self.world] for size, n in found}

    def _plan(self, epoch: int) -> tuple[Cut, np.ndarray]:
        """All global micro-batches, and the places of those that every rank has a part of."""
        if self._planned is None or self._planned[0] != epoch:
            seed, (codes, sizes) = self.buckets.seed, self.buckets(epoch)
            order = keyed(seed, "order", epoch).permutation(self.clips)
            lengths = [self.batch_of(size) * self.world for size in sizes]
            plan = cut(order, codes, lengths)
            if len(sizes) > 1:  # else small sizes, and what is left of each, would come last
                plan = plan.taken(keyed(seed, "order of batches", epoch).permutation(len(plan)))
            least = np.array(lengths)[plan.codes] if self.drop_incomplete else self.world
            kept = np.flatnonzero(plan.stops - plan.starts >= least)
            if self.turns:
                of_each = [kept[plan.codes[kept] == code] for code in range(len(sizes))]
                rounds = min(map(len, of_each))
                kept = np.stack([places[:rounds] for places in of_each], 1).ravel()
            self._planned = epoch, plan, kept
        return self._planned[1:]


class Loader:
    """Micro-batches of one rank; an iterator goes from where the loader stands to the epoch's end.

    `batch_of`: clips of a size, where items have several (default: `batch_size`). The state counts
    what was handed out, not what workers prepare ahead. `turns`: see `Order`. Raises DataError
    (exit code 3) without data, with less than one global micro-batch, with more than `max_bad`
    different bad items (counted by each process, in `bad`), and where no good item is found.
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
        batch_of: Callable[[Clip], int] | None = None,
        drop_incomplete: bool = False,
        turns: bool = False,
    ) -> None:
        def clips_of(size: Size) -> int:
            return batch_size if size is None or batch_of is None else batch_of(size)

        self.stride = batch_size * world
        buckets = Buckets(items, seed)
        self.order = Order(buckets, clips_of, rank, world, drop_incomplete, turns)
        self.sizes = self.order.sizes()
        self._enough(batch_size)
        self.max_bad = max_bad
        self.bad: Bad = {}
        self._batches = DataLoader(
            _MicroBatches(buckets, clips_of),
            sampler=self.order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else the global generator is drawn from
        )

    def __len__(self) -> int:
        """Micro-batches in this whole epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self.order):
            raise DataError(f"epoch {self.order.epoch}: {self._too_few()}")
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
            "stride": self.stride,
            "sizes": self.sizes,
            "bad": dict(self.bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError where the data or the global micro-batch have another size."""
        was, now = (state["clips"], state["stride"]), (self.order.clips, self.stride)
        if was != now:
            raise DataError(
                f"the checkpoint has {was[0]} clips in micro-batches of {was[1]} (all processes), "
                f"now there are {now[0]} in {now[1]}: the order would be another. Restore them, or "
                "start anew with resume=never"
            )
        before, sizes = state.get("sizes", {}), self.sizes
        if before != sizes:
            size = next(s for s in (*before, *sizes) if before.get(s) != sizes.get(s))
            was, now = (
                " in micro-batches of ".join(map(str, x.get(size, [0, 0]))) for x in (before, sizes)
            )
            raise DataError(
                f"the checkpoint has {was} clips of {size} (all processes), now there are {now}: "
                "the order would be another. Restore them, or start anew with resume=never"
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

    def _enough(self, batch_size: int) -> None:
        """Raises DataError without one global micro-batch."""
        order = self.order
        if not order.clips:
            raise DataError("there are no clips to train on")
        if self.sizes:
            if not len(order):
                raise DataError(self._too_few())
        elif order.clips < self.stride:
            processes = f" on {order.world} processes" if order.world > 1 else ""
            size = order.clips // order.world
            cure = f"set data.batch_size={size}" if size else "add clips"
            raise DataError(
                f"data.batch_size={batch_size}{processes} needs {self.stride} clips, there are "
                f"{order.clips}: {cure}"
            )

    def _too_few(self) -> str:
        order = self.order
        shown = [f"{n} of {size}" for size, (n, _) in self.sizes.items()]
        what = "a whole micro-batch" if order.drop_incomplete else f"{order.world} processes"
        cure = (
            "set data.drop_incomplete=false, a smaller batch size, "
            if order.drop_incomplete
            else ""
        )
        return (
            f"of no size there are enough clips for {what} ({', '.join(shown[:SHOWN])}"
            f"{', ...' if shown[SHOWN:] else ''}): {cure or 'use '}fewer sizes, or add clips"
        )


def batches(items: Items, batch_size: int, seed: int = 0, only: Size = None) -> Iterator[Batch]:
    """Every item once, in the order of the items (epoch 0), for validation and evaluation.

    Where items have several sizes, each batch has one, and with `only` all have that one. A bad
    item is left out and the positions of the others stay; it is named in `bad` of its
    micro-batch, or of a neighbour where that is empty. Raises DataError where no item is usable.
    """
    ready: Batch | None = None  # held back until all that `bad` must name is known
    unsaid: Bad = {}
    codes, sizes = Buckets(items, seed)(0)
    plan = cut(np.arange(len(items)), codes, [batch_size] * len(sizes))
    for start, stop, code in zip(plan.starts, plan.stops, plan.codes, strict=True):
        if only is not None and sizes[code] not in (None, only):
            continue
        indices = plan.flat[start:stop]
        batch, bad = _micro_batch(items, seed, 0, indices, indices)
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


def usual_size(items: Items, seed: int) -> Size:
    """The size of most items; None where they do not tell."""
    return Buckets(items, seed)(0)[1][0] if len(items) else None


class _MicroBatches(Dataset):
    """What the workers run: a micro-batch for a key. Bad items come back as data, not as errors."""

    def __init__(self, buckets: Buckets, batch_of: Callable[[Size], int]) -> None:
        self.buckets, self.batch_of = buckets, batch_of

    def __getitem__(self, key: Key) -> tuple[Batch | None, Bad]:
        epoch, first, indices = key
        batch, bad = self._loaded(epoch, first, indices)
        if batch is None and (indices := self._of_another_size(*key)) is not None:
            batch, more = self._loaded(epoch, first, indices)
            bad |= more
        if batch is not None:
            batch.bad = _lines(bad)
        return batch, bad

    def _loaded(self, epoch: int, first: int, indices: np.ndarray) -> tuple[Batch | None, Bad]:
        items, seed = self.buckets.items, self.buckets.seed
        positions = np.arange(first, first + len(indices))
        return _micro_batch(items, seed, epoch, positions, indices, self._like)

    def _like(self, epoch: int, index: int) -> np.ndarray:
        """All items of the size of one."""
        codes, _ = self.buckets(epoch)
        return np.flatnonzero(codes == codes[index])

    def _of_another_size(self, epoch: int, first: int, indices: np.ndarray) -> np.ndarray | None:
        """For a size of which no item is usable: items of the most common other one."""
        codes, sizes = self.buckets(epoch)
        if len(sizes) == 1:
            return None
        other = 0 if codes[indices[0]] else 1
        count = min(len(indices), self.batch_of(sizes[other]))
        rng = keyed(self.buckets.seed, "other size", epoch, first)
        return rng.choice(np.flatnonzero(codes == other), count)


def _micro_batch(
    items: Items,
    seed: int,
    epoch: int,
    positions: np.ndarray,
    indices: np.ndarray,
    like: Callable[[int, int], np.ndarray] | None = None,
) -> tuple[Batch | None, Bad]:
    """Loads items for positions in the epoch.

    A bad item is replaced by one of `like` (epoch, its index), else left out; no batch where a
    replacement is not found or nothing is left.
    """
    bad: Bad = {}
    loaded: list[tuple[int, str, Sample]] = []
    for position, index in zip(positions.tolist(), indices.tolist(), strict=True):
        for candidate in _candidates(seed, epoch, position, index, like):
            name = items.id(candidate)
            try:
                loaded.append(
                    (position, name, items.load(candidate, keyed(seed, "data", epoch, name)))
                )
                break
            except BadItem as e:
                bad[name] = str(e)
        else:
            if like:
                return None, bad
    return (_collate(epoch, *zip(*loaded, strict=True)) if loaded else None), bad


def _candidates(
    seed: int,
    epoch: int,
    position: int,
    index: int,
    like: Callable[[int, int], np.ndarray] | None,
) -> Iterator[int]:
    """The item itself, then what may replace it."""
    yield index
    if like:
        others = like(epoch, index)
        for attempt in range(TRIES):
            rng = keyed(seed, "replacement", epoch, position, attempt)
            yield int(others[rng.integers(len(others))])


def _collate(
    epoch: int, positions: tuple[int, ...], ids: tuple[str, ...], samples: tuple[Sample, ...]
) -> Batch:
    first = samples[0]
    tensors: dict[str, Any] = {
        name: torch.stack([s[name] for s in samples]) for name in SAMPLE_TENSORS if name in first
    }
    scalars = {
        name: torch.tensor([s[name] for s in samples], dtype=torch.float32)
        for name in sorted(SCALARS.intersection(first))
    }
    return Batch(
        **tensors,
        captions=[s["caption"] for s in samples] if "caption" in first else None,
        scalars=scalars
        | (told(Clip(*first["video"].shape), len(samples)) if "video" in first else {}),
        ids=list(ids),
        epoch=epoch,
        position=torch.tensor(positions),
    )


def told(clip: Clip, count: int, device: Any = None) -> dict[str, torch.Tensor]:
    """SIZES of `count` clips of this size, each (count,)."""
    numbers = (clip.height, clip.width, clip.height / clip.width)
    values = zip(SIZES, numbers, strict=True)
    return {n: torch.full((count,), float(x), device=device) for n, x in values}


def _as_it_is(batch: Any) -> Any:
    return batch


def _lines(bad: Bad) -> list[str]:
    return [f"{name}: {reason}" for name, reason in bad.items()]


def _some(bad: Bad) -> str:
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(_lines(bad)[:SHOWN]) + more
