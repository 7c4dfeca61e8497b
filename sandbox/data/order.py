"""The order of clips in an epoch, as a pure function of (seed, epoch), on any number of processes.

An epoch is a permutation of the clips. A global micro-batch is the next `batch_size * world` of
them, and rank r takes the r-th of `world` equal slices: 2 processes with 16 clips each see the
same batches as 1 process with 32. Where clips have several sizes, each micro-batch has one size:
the clips of a size are taken in the order of the permutation, and the micro-batches are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from sandbox.contracts import Bucketed, Clip, Items
from sandbox.data.randomness import keyed

Key = tuple[int, int, np.ndarray]  # epoch, position of the first clip, indices
Size = Clip | None  # None: all items have one size, which they do not report


class Buckets:
    """The sizes of `items`, which may differ between epochs; the last requested epoch is cached."""

    def __init__(self, items: Items, seed: int) -> None:
        self.items, self.seed = items, seed
        self._epoch, self._sizes = -1, [None]
        self._codes = np.zeros(len(items), np.int32)

    def __call__(self, epoch: int) -> tuple[np.ndarray, Sequence[Size]]:
        """(size index of each item, sizes); the size of most items is the first."""
        if isinstance(self.items, Bucketed) and epoch != self._epoch and len(self.items):
            found: dict[Clip, int] = {}
            codes = np.array([self._code(i, epoch, found) for i in range(len(self.items))], int)
            by_count = np.argsort(-np.bincount(codes, minlength=len(found)), kind="stable")
            self._codes = np.argsort(by_count)[codes].astype(np.int32)
            self._sizes = [[*found][i] for i in by_count]
            self._epoch = epoch
        return self._codes, self._sizes

    def _code(self, index: int, epoch: int, found: dict[Clip, int]) -> int:
        rng = keyed(self.seed, "data", epoch, self.items.id(index))
        size = self.items.bucket(index, rng)  # type: ignore[attr-defined]
        return found.setdefault(size, len(found))


@dataclass
class BatchPlan:
    """Indices cut into batches of one size each: `indices[starts[i] : stops[i]]`.

    `firsts`: the number of clips before each batch; `codes`: its size index.
    """

    indices: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    codes: np.ndarray
    firsts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lengths = self.stops - self.starts
        self.firsts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, places: np.ndarray) -> BatchPlan:
        """The batches at `places`, as a plan with its own `firsts`."""
        return BatchPlan(self.indices, self.starts[places], self.stops[places], self.codes[places])


def plan_batches(order: np.ndarray, codes: np.ndarray, lengths: Sequence[int]) -> BatchPlan:
    """Batches of `lengths[code]` clips of one size; the last batch of each size may be shorter.

    `codes` are those of all items. Batches are sorted by the place of their first clip in `order`.
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
    plan = BatchPlan(order[by_size], starts, stops, codes[by_size[starts]])
    return plan.select(np.argsort(by_size[starts]))


@dataclass
class Order:
    """The position of one rank in the order of clips: `taken` micro-batches of `epoch`.

    Iterating gives the rest of the epoch. `batch_of`: clips of a size per rank; a global
    micro-batch has `world` times as many. The last one of each size in an epoch is shorter, a
    multiple of `world`, or left out with `drop_incomplete`. With `turns` the sizes alternate, one
    micro-batch each, until one size has no more.
    """

    buckets: Buckets
    batch_of: Callable[[Size], int]
    rank: int
    world: int
    drop_incomplete: bool = False
    turns: bool = False
    epoch: int = 0
    taken: int = 0
    _planned: tuple[int, BatchPlan, np.ndarray] | None = None  # epoch, all batches, those used

    @property
    def clips(self) -> int:
        return len(self.buckets.items)

    def __len__(self) -> int:
        """Micro-batches in the full epoch."""
        return len(self._plan(self.epoch)[1])

    def __iter__(self) -> Iterator[Key]:
        epoch, taken = self.epoch, self.taken
        plan, used = self._plan(epoch)
        for place in used[taken:]:
            size = (plan.stops[place] - plan.starts[place]) // self.world
            offset = self.rank * size
            start = plan.starts[place] + offset
            yield epoch, int(plan.firsts[place] + offset), plan.indices[start : start + size]

    def advance(self) -> None:
        """Moves on by one micro-batch; after the last one to (epoch + 1, 0)."""
        self.taken += 1
        if self.taken == len(self):
            self.epoch, self.taken = self.epoch + 1, 0

    def sizes(self) -> dict[str, list[int]]:
        """{size: [clips, clips in a global micro-batch]} of epoch 0; empty for a single size."""
        codes, sizes = self.buckets(0)
        if len(sizes) == 1:
            return {}
        counts = np.bincount(codes, minlength=len(sizes)).tolist()
        found = zip(sizes, counts, strict=True)
        return {str(size): [n, self.batch_of(size) * self.world] for size, n in found}

    def _plan(self, epoch: int) -> tuple[BatchPlan, np.ndarray]:
        """All global micro-batches, and the places of those that are used."""
        if self._planned is None or self._planned[0] != epoch:
            seed, (codes, sizes) = self.buckets.seed, self.buckets(epoch)
            order = keyed(seed, "order", epoch).permutation(self.clips)
            lengths = [self.batch_of(size) * self.world for size in sizes]
            plan = plan_batches(order, codes, lengths)
            if len(sizes) > 1:  # else rare sizes and incomplete batches would come last
                plan = plan.select(keyed(seed, "order of batches", epoch).permutation(len(plan)))
            least = np.array(lengths)[plan.codes] if self.drop_incomplete else self.world
            used = np.flatnonzero(plan.stops - plan.starts >= least)
            if self.turns:
                by_size = [used[plan.codes[used] == code] for code in range(len(sizes))]
                rounds = min(map(len, by_size))
                used = np.stack([places[:rounds] for places in by_size], 1).ravel()
            self._planned = epoch, plan, used
        return self._planned[1:]
