"""Jobs of workers, in a module that a new process imports in a moment."""

from __future__ import annotations

import os
import signal
import time


def double(number: int) -> int:
    """13 ends its process, as a decoder does that crashes; a negative one is an error."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise ValueError(f"planned failure of {number}")
    time.sleep(0.001 * (number % 3))
    return 2 * number
