"""Signal handling of the processes of a run."""

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # all request a stop


def current_handlers() -> dict[int, Any]:
    """The handlers of SIGNALS, without ignored signals (nohup), which stay ignored."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    return {k: v or signal.SIG_DFL for k, v in handlers.items() if v is not signal.SIG_IGN}


def set_handlers(handlers: Mapping[int, Any]) -> None:
    """Installs handlers; does nothing outside the main thread, where Python does not allow it."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """`worker_init_fn` of data workers: they ignore SIGNALS, and their rank stops them.

    Schedulers signal every process of a job, and a rank needs its workers to finish the step.
    """
    set_handlers(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def write_stderr(text: str) -> None:
    """A line on stderr from a signal handler, where `print` is not reentrant."""
    os.write(2, f"\n{text}\n".encode())
