"""Jobs of workers, in a module that a new process imports in a moment."""

from __future__ import annotations

import os
import signal
import time


class Stranger(Exception):
    """Does not survive pickling: its arguments are not those of its base class."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(f"a failure of {height} x {width}")


def double(number: int) -> int:
    """13 ends its process, as a decoder does that crashes; a negative one is an error, of which
    that of -2 cannot be sent to another process.
    """
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == -2:
        raise Stranger(1, 1)
    if number < 0:
        raise ValueError(f"planned failure of {number}")
    time.sleep(0.001 * (number % 3))
    return 2 * number
