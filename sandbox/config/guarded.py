"""Runs code of others with limits: it can neither end the program, fork, print nor take long."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

SECONDS = 3.0
REFUSED = ("_exit", "abort", "fork", "forkpty", "kill", "killpg", "execv", "execve", "system")


class Refused(BaseException):
    """What the code did; no Exception, so that the code itself does not catch it."""


@contextlib.contextmanager
def guarded(seconds: float = SECONDS) -> Iterator[None]:
    """Inside the block code that takes long, ends the program or forks it raises Refused.

    Its output is dropped. The time limit needs the main thread and a system with SIGALRM. One call
    of C code cannot be interrupted: after twice the time the process ends with exit code 1 and
    prints which line made it.
    """
    kept = {name: getattr(os, name) for name in REFUSED if hasattr(os, name)}
    for name in kept:
        setattr(os, name, _refused(f"os.{name}"))
    try:
        with _limit(seconds), contextlib.redirect_stdout(io.StringIO()):
            yield
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as e:
        if isinstance(e, KeyboardInterrupt) and not e.args:  # Ctrl-C
            raise
        raise Refused(f"ends the program ({type(e).__name__})") from e
    finally:
        for name, function in kept.items():
            setattr(os, name, function)


def _refused(name: str) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise Refused(f"calls {name}")

    return call


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Refused(f"takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        # repeated, for code that catches it
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
