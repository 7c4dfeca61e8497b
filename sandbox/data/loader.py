"""The data loader: batches in the order of `sandbox.data.order`, which resumes exactly.

No state of a worker or of a global generator has an influence, and the state to save is two
numbers: the epoch and the micro-batches taken from it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from sandbox.contracts import Batch, Clip, DataError, Items
from sandbox.data.batching import TRIES, Bad, MicroBatches, lines, micro_batch
from sandbox.data.order import Buckets, Order, Size, plan_batches
from sandbox.distributed.signals import ignore_signals

SHOWN = 5  # bad items, or sizes, that an error lists
CHANGED = (
    "which changes the order. Restore the data and processes, or start again with resume=never"
)


class Loader:
    """Micro-batches of one rank. An iterator continues from the loader's state to the epoch's end.

    `batch_of`: clips of a size, where items have several sizes (default: `batch_size`); `turns`:
    see `Order`. The state counts batches that were yielded, not those that workers have prefetched.
    `bad` has this process's bad items. Raises DataError (exit code 3) without data, with less than
    one global micro-batch, with more than `max_bad` bad items, or where no item is usable.
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
        self._check_count(batch_size)
        self.max_bad = max_bad
        self.bad: Bad = {}
        self._batches = DataLoader(
            MicroBatches(buckets, clips_of),
            sampler=self.order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_identity,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # else it draws from the global generator
        )

    def __len__(self) -> int:
        """Micro-batches in the full epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if not len(self.order):
            raise DataError(f"epoch {self.order.epoch}: {self._too_few()}")
        for batch, bad in self._batches:
            self.bad |= bad
            if len(self.bad) > self.max_bad:
                raise DataError(
                    f"{len(self.bad)} items are unusable, more than data.max_bad={self.max_bad}: "
                    f"fix or remove them, or raise it: {_some(self.bad)}"
                )
            if batch is None:
                raise DataError(f"no usable clip in {TRIES + 1} tries: {_some(bad)}")
            self.order.advance()
            yield batch

    def close(self) -> None:
        """Stops the workers; a later iterator starts new ones.

        The garbage collector would take five seconds per worker: it may close the queue that tells
        a worker to exit before the message is sent.
        """
        iterator = self._batches._iterator
        self._batches._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers: position in the order, sizes, and the bad items so far."""
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
        """Raises DataError where the number of clips or the global micro-batch has changed."""
        was = {"": [state["clips"], state["stride"]], **state.get("sizes", {})}
        now = {"": [self.order.clips, self.stride], **self.sizes}
        for size in {**was, **now}:
            before, after = was.get(size, [0, 0]), now.get(size, [0, 0])
            if before != after:
                of = f" of {size}" if size else ""
                raise DataError(
                    f"the checkpoint has {before[0]} clips{of} in micro-batches of {before[1]} "
                    f"(all processes), now there are {after[0]} in {after[1]}, {CHANGED}"
                )
        self.order.epoch, self.order.taken = state["epoch"], state["taken"]
        self.bad = dict(state["bad"])

    def _check_count(self, batch_size: int) -> None:
        """Raises DataError without one global micro-batch."""
        order = self.order
        if not order.clips:
            raise DataError("there are no clips to train on")
        if self.sizes and not len(order):
            raise DataError(self._too_few())
        if not self.sizes and order.clips < self.stride:
            processes = f" on {order.world} processes" if order.world > 1 else ""
            size = order.clips // order.world
            raise DataError(
                f"data.batch_size={batch_size}{processes} needs {self.stride} clips, there are "
                f"{order.clips}: " + (f"set data.batch_size={size}" if size else "add clips")
            )

    def _too_few(self) -> str:
        counts = [f"{n} of {size}" for size, (n, _) in self.sizes.items()]
        what, fix = f"{self.order.world} processes", "use "
        if self.order.drop_incomplete:
            what = "a complete micro-batch"
            fix = "set data.drop_incomplete=false, a smaller batch size, "
        return (
            f"no size has enough clips for {what} ({', '.join(counts[:SHOWN])}"
            f"{', ...' if counts[SHOWN:] else ''}): {fix}fewer sizes, or add clips"
        )


def batches(items: Items, batch_size: int, seed: int = 0, only: Size = None) -> Iterator[Batch]:
    """Every item once, in the order of the items (epoch 0), for validation and evaluation.

    Where items have several sizes, each batch has one size; `only` skips the others. A bad item is
    left out, without a change of other positions, and listed in `bad` of its micro-batch, or of a
    neighbour if its own is empty. Raises DataError where no item is usable.
    """
    ready: Batch | None = None  # yielded once `bad` is complete
    bad: Bad = {}
    codes, sizes = Buckets(items, seed)(0)
    plan = plan_batches(np.arange(len(items)), codes, [batch_size] * len(sizes))
    for start, stop, code in zip(plan.starts, plan.stops, plan.codes, strict=True):
        if only is not None and sizes[code] not in (None, only):
            continue
        indices = plan.indices[start:stop]
        batch, more = micro_batch(items, seed, 0, indices, indices)
        bad |= more
        if batch is not None:
            if ready is not None:
                yield ready
            batch.bad, bad = lines(bad), {}
            ready = batch
    if ready is None:
        raise DataError(f"no clip is usable: {_some(bad)}" if bad else "there are no clips")
    ready.bad += lines(bad)
    yield ready


def usual_size(items: Items, seed: int) -> Size:
    """The size of most items; None where they do not report it."""
    return Buckets(items, seed)(0)[1][0] if len(items) else None


def _identity(batch: Any) -> Any:
    return batch


def _some(bad: Bad) -> str:
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return "; ".join(lines(bad)[:SHOWN]) + more
