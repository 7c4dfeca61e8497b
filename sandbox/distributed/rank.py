"""A rank: one of the processes of a run, with the collectives and stop requests that it needs.

`distributed.supervisor`, torchrun or srun start ranks; in a notebook or a test the current process
is the only rank. Importing this module does not import torch.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Self

from sandbox.contracts import Preempted
from sandbox.distributed.signals import current_handlers, set_handlers, write_stderr

POLL_SECONDS = 0.02  # between two checks of the store


class FirstRankFailed(RuntimeError):
    """Rank 0 failed in `rank0_first`; its own error has the reason."""


class Rank:
    """Process number `index` of `world`, and number `local` of `local_world` on machine `node`.

    A signal only sets a flag, which training checks after an optimizer step, so that a saved state
    is complete. Without a supervisor, a second signal has its previous effect: Ctrl-C raises
    KeyboardInterrupt. Python delivers signals to the main thread alone.
    """

    def __init__(
        self,
        index: int = 0,
        world: int = 1,
        local: int = 0,
        local_world: int = 1,
        node: int = 0,
        supervised: bool = False,
    ) -> None:
        self.index, self.world = index, world
        self.local, self.local_world, self.node = local, local_world, node
        self.supervised = supervised
        self._signal = [0]  # the stop signal; a list, which `as_single` shares
        self._keys = 0  # store keys used so far
        self._previous: dict[int, Any] = {}
        self._process = 0  # that handles the signals

    def variables(self) -> dict[str, str]:
        """The environment variables in which Lightning and others look for the rank's place."""
        return {
            "RANK": str(self.index),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "NODE_RANK": str(self.node),
        }

    # stop requests

    @property
    def stop_signal(self) -> str | None:
        """The name of the signal that requested this rank to stop; other ranks may have none."""
        return signal.Signals(self._signal[0]).name if self._signal[0] else None

    def request_stop(self, number: int) -> None:
        self._signal[0] = number

    def agree_to_stop(self) -> str | None:
        """The name of a stop signal that any rank has received, the same on all ranks, or None.

        Collective: all ranks call it after the same step.
        """
        if self.world > 1:
            import torch

            agreed = torch.tensor(self._signal[0])  # on the CPU: no wait for kernels
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            if not agreed:  # a signal that arrives during the call counts at the next step
                return None
            self.request_stop(int(agreed))
        return self.stop_signal

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Inside the block a signal requests a stop and has no other effect."""
        if self._previous:  # nested
            self.install_handlers()
            yield
            return
        self._previous, self._process = current_handlers(), os.getpid()
        self.install_handlers()
        try:
            yield
        finally:
            set_handlers(self._previous)
            self._previous = {}

    def install_handlers(self) -> None:
        """Installs the handlers again, after a library may have replaced them."""
        set_handlers(dict.fromkeys(self._previous, self._on_signal))

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a child, forked with this handler
            if number != signal.SIGINT:  # a terminal sends that to all; the rank handles it
                os._exit(128 + number)
            return
        self.request_stop(number)
        if not self.supervised:
            set_handlers({number: self._previous[number]})
            write_stderr("Stopping after this step. Send the signal again to stop immediately.")

    # collectives

    def broadcast_plain(self, value: Any) -> Any:
        """The value of rank 0 (plain containers), on all ranks."""
        return self.gather_plain(value if self.index == 0 else None)[0]

    def gather_plain(self, value: Any) -> list[Any]:
        """The values of all ranks (plain containers), in rank order, on all ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, check_plain(value, "value"))
        return values

    def mean(self, tensor: Any) -> Any:
        """The mean of a tensor over all ranks, on all ranks."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.world

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the other ranks, which wait without a timeout.

        They raise FirstRankFailed if it fails in rank 0.
        """
        if self.world == 1:
            yield
            return
        store, key = self._store_key()
        if self.index > 0:
            while not store.check([key]):  # a collective would time out
                time.sleep(POLL_SECONDS)
            if store.get(key) != b"done":
                raise FirstRankFailed("rank 0 failed in the block that it runs first")
            yield
            return
        try:
            yield
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")

    def wait_for_all(self) -> None:
        """A barrier without a timeout. Raises Preempted at a stop request."""
        if self.world == 1:
            return
        store, key = self._store_key()
        store.add(key, 1)
        while store.add(key, 0) < self.world:  # a collective would time out
            if self.stop_signal:
                raise Preempted(
                    f"stopped by {self.stop_signal} while waiting for the other processes"
                )
            time.sleep(POLL_SECONDS)

    def as_single(self) -> Self:
        """This rank as the only one of a run, for work that others wait for; shares its signals."""
        single = copy(self)
        single.index = single.local = 0
        single.world = single.local_world = 1
        return single

    def _store_key(self) -> tuple[Any, str]:
        """The store, and a new key, the same on all ranks."""
        from torch.distributed import distributed_c10d

        self._keys += 1
        return distributed_c10d._get_default_store(), f"sandbox/{self._keys}"


def check_plain(value: Any, name: str) -> Any:
    """Returns `value`. Raises TypeError unless it has only dicts, lists, tuples, numbers, strings
    and None.
    """
    if type(value) is dict:
        for key, item in value.items():
            check_plain(key, f"a key of {name}")
            check_plain(item, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{name}.{i}")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{name} is a {type(value).__qualname__}: want plain containers")
    return value
