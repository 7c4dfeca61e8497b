"""Loading the items of a micro-batch and stacking them; bad items are replaced or left out.

The randomness of a clip is keyed by (seed, epoch, id). A bad item is replaced by another one of its
size, which is keyed by its position.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sandbox.contracts import (
    NUMBERS,
    SAMPLE_TENSORS,
    SIZES,
    BadItem,
    Batch,
    Clip,
    Items,
    Sample,
)
from sandbox.data.order import Buckets, Key, Size
from sandbox.data.randomness import keyed

REASONS = 4  # that `summary` names
TRIES = 20  # replacements that are tried for a bad item

Bad = dict[str, str]  # id -> reason


class MicroBatches(Dataset):
    """What data workers run: key -> (micro-batch, bad items). Bad items raise no error here."""

    def __init__(self, buckets: Buckets, batch_of: Callable[[Size], int]) -> None:
        self.buckets, self.batch_of = buckets, batch_of

    def __getitem__(self, key: Key) -> tuple[Batch | None, Bad]:
        epoch, first, indices = key
        batch, bad = self._load(epoch, first, indices)
        if batch is None and (indices := self._of_another_size(*key)) is not None:
            batch, more = self._load(epoch, first, indices)
            bad |= more
        if batch is not None:
            batch.bad = lines(bad)
        return batch, bad

    def _load(self, epoch: int, first: int, indices: np.ndarray) -> tuple[Batch | None, Bad]:
        items, seed = self.buckets.items, self.buckets.seed
        positions = np.arange(first, first + len(indices))
        return micro_batch(items, seed, epoch, positions, indices, self._same_size)

    def _same_size(self, epoch: int, index: int) -> np.ndarray:
        """All items that have the size of one."""
        codes, _ = self.buckets(epoch)
        return np.flatnonzero(codes == codes[index])

    def _of_another_size(self, epoch: int, first: int, indices: np.ndarray) -> np.ndarray | None:
        """Where no item of a size is usable: items of the most common other size."""
        codes, sizes = self.buckets(epoch)
        if len(sizes) == 1:
            return None
        other = 0 if codes[indices[0]] else 1
        count = min(len(indices), self.batch_of(sizes[other]))
        rng = keyed(self.buckets.seed, "other size", epoch, first)
        return rng.choice(np.flatnonzero(codes == other), count)


def micro_batch(
    items: Items,
    seed: int,
    epoch: int,
    positions: np.ndarray,
    indices: np.ndarray,
    same_size: Callable[[int, int], np.ndarray] | None = None,
) -> tuple[Batch | None, Bad]:
    """Loads the items at `indices` for these positions in the epoch.

    A bad item is replaced by one of same_size(epoch, its index), or left out without that function.
    The batch is None where no replacement is usable or no item is left.
    """
    bad: Bad = {}
    loaded: list[tuple[int, str, Sample]] = []
    for position, index in zip(positions.tolist(), indices.tolist(), strict=True):
        for candidate in _candidates(seed, epoch, position, index, same_size):
            name = items.id(candidate)
            try:
                sample = items.load(candidate, keyed(seed, "data", epoch, name))
                loaded.append((position, name, sample))
                break
            except BadItem as e:
                bad[name] = str(e)
        else:
            if same_size:
                return None, bad
    return (_collate(epoch, *zip(*loaded, strict=True)) if loaded else None), bad


def _candidates(
    seed: int,
    epoch: int,
    position: int,
    index: int,
    same_size: Callable[[int, int], np.ndarray] | None,
) -> Iterator[int]:
    """The item, then its replacements."""
    yield index
    if same_size:
        others = same_size(epoch, index)
        for attempt in range(TRIES):
            rng = keyed(seed, "replacement", epoch, position, attempt)
            yield int(others[rng.integers(len(others))])


def _collate(
    epoch: int, positions: tuple[int, ...], ids: tuple[str, ...], samples: tuple[Sample, ...]
) -> Batch:
    first, count = samples[0], len(samples)
    tensors: dict[str, Any] = {
        name: torch.stack([s[name] for s in samples]) for name in SAMPLE_TENSORS if name in first
    }
    scalars = {
        name: torch.tensor([s[name] for s in samples], dtype=torch.float32)
        for name in sorted(NUMBERS.intersection(first))
    }
    sizes = size_scalars(Clip(*first["video"].shape), count) if "video" in first else {}
    return Batch(
        **tensors,
        captions=[s["caption"] for s in samples] if "caption" in first else None,
        scalars=scalars | sizes,
        ids=list(ids),
        epoch=epoch,
        position=torch.tensor(positions),
    )


def size_scalars(clip: Clip, count: int, device: Any = None) -> dict[str, torch.Tensor]:
    """The scalars SIZES for `count` clips of one size, each (count,)."""
    values = (clip.height, clip.width, clip.height / clip.width)
    pairs = zip(SIZES, values, strict=True)
    return {name: torch.full((count,), float(x), device=device) for name, x in pairs}


def reasons(bad: list[str]) -> Bad:
    """The inverse of `lines`."""
    return dict(line.split(": ", 1) for line in bad)


def summary(bad: Bad) -> str:
    """ "3 clips are unusable (2 x has no caption, 1 x is empty)": the most frequent reasons."""
    counts = Counter(bad.values()).most_common()
    shown = [f"{n} x {reason}" for reason, n in counts[:REASONS]]
    shown += [f"{len(counts) - REASONS} other reasons"] if len(counts) > REASONS else []
    verb = "clip is" if len(bad) == 1 else "clips are"
    return f"{len(bad)} {verb} unusable ({', '.join(shown)})"


def lines(bad: Bad) -> list[str]:
    return [f"{name}: {reason}" for name, reason in bad.items()]
