"""The process that trains, and how it learns that it shall stop.

A signal only sets a flag, which is looked at after each optimizer step: what is saved is whole.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Rank(Protocol):
    """What training asks of its process, which is number `index` of `world`."""

    index: int
    world: int

    def listening(self) -> AbstractContextManager[None]:
        """Inside the block a request to stop is noted, and does nothing else."""
        ...

    def listen(self) -> None:
        """The same again, where a library has put handlers of its own in place."""
        ...

    def agree_to_stop(self) -> str | None:
        """Why to stop, or None; the same on all ranks, which call this after the same step."""
        ...


class Alone:
    """The only process of a run: SIGTERM and Ctrl-C ask it to stop, a second one does so at once.

    Outside the main thread, which alone may handle signals, nobody asks.
    """

    index = 0
    world = 1

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            self._set(self._before)

    def listen(self) -> None:
        self._set(dict.fromkeys(SIGNALS, self._note))

    def agree_to_stop(self) -> str | None:
        return self.asked

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked with these handlers
            if number != signal.SIGINT:  # which a terminal sends to all: the parent sees to it
                os._exit(128 + number)
            return
        self.asked = signal.Signals(number).name
        self._set({number: self._before[number]})
        # Not print, which cannot be entered again where the signal met it.
        os.write(2, b"\nstopping after this step; the same again stops at once\n")

    def _set(self, handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
