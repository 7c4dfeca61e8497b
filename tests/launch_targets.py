"""What ranks do in the tests of the supervisor: small functions, found by this module's name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sandbox.contracts import Diverged, Preempted, SizeError
from sandbox.distributed.rank import Rank
from sandbox.distributed.signals import ignore_signals


def facts(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """What a rank finds around it, and what it was given."""
    import multiprocessing

    return {
        "settings": settings,
        "numbers": [rank.index, rank.world, rank.local, rank.local_world],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "pid": os.getpid(),
        "start_method": multiprocessing.get_start_method(),
    }


def greet(settings: dict[str, Any], rank: Rank) -> list[Any]:
    """Each rank writes a line to stdout and stderr; returns what rank 1 gets from rank 0."""
    print(f"stdout of {rank.index}")
    print(f"stderr of {rank.index}", file=sys.stderr)
    rank.gather_plain(None)
    heard = rank.broadcast_plain({"from": rank.index})
    note(settings, f"heard {heard['from']}")
    return [rank.index, heard]


def unplain(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    return {"path": Path("here")}


def fail(settings: dict[str, Any], rank: Rank) -> None:
    """Rank `settings["rank"]` ends as `settings["how"]`, while the others wait for it."""
    rank.gather_plain(None)
    note(settings, "working")
    if rank.index == settings["rank"]:
        FAILURES[settings["how"]]()
    while True:
        rank.gather_plain(None)


def first(settings: dict[str, Any], rank: Rank) -> None:
    """Rank 0 is stopped in the block that the others wait for."""
    rank.gather_plain(None)
    note(settings, "working")
    with rank.rank0_first():
        if rank.index == 0:
            os.kill(os.getpid(), signal.SIGSTOP)


class Stranger(Exception):
    """Does not survive pickling: its arguments are not those of its base class."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{what} of size {size}")


def _planned() -> None:
    raise ValueError("planned failure")


def _strange() -> None:
    raise Stranger("a failure", 4)


def _diverged() -> None:
    raise Diverged("step 3: loss=nan is not finite")


def _misfit() -> None:
    raise SizeError("frames", 7, "4 k + 1")


FAILURES = {
    "error": _planned,
    "strange error": _strange,
    "diverged": _diverged,
    "misfit": _misfit,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda: os._exit(3),
    "hang": lambda: time.sleep(600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def count(settings: dict[str, Any], rank: Rank) -> None:
    """Steps until any rank gets a stop request."""
    for step in range(100_000):
        if step == 2:
            note(settings, "working")
        time.sleep(0.01)
        if why := rank.agree_to_stop():
            note(settings, f"stopped after {step}")
            raise Preempted(f"stopped by {why}")


def count_items(settings: dict[str, Any], rank: Rank) -> None:
    """The same with data workers, which the signal must not end."""
    from torch.utils.data import DataLoader

    items: Any = range(100_000)
    loader = DataLoader(items, num_workers=2, batch_size=None, worker_init_fn=ignore_signals)
    asked_at = 0
    for step, _ in enumerate(loader):
        if step == 2:
            note(settings, "working")
        time.sleep(0.01)
        asked_at = asked_at or (step if rank.agree_to_stop() else 0)
        if asked_at and step > asked_at + 20:  # more than the workers have prepared
            note(settings, f"stopped after {asked_at}")
            raise Preempted(f"stopped by {rank.stop_signal}")


def deaf(settings: dict[str, Any], rank: Rank) -> None:
    """Never looks whether it shall stop."""
    note(settings, "working")
    time.sleep(600)


def total(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """A job of a sweep: what all ranks make of its seed."""
    import torch
    import torch.distributed as dist

    seed, held = settings["seed"], torch.tensor(float(settings["seed"] + rank.index))
    if seed == settings.get("bad") and rank.index == 1:
        raise ValueError("planned failure")
    dist.all_reduce(held)
    return {"seed": seed, "total": held.item(), "pid": os.getpid()}


def note(settings: dict[str, Any], text: str) -> None:
    """Adds a line to the file `settings["log"]`, with this process in front."""
    if settings.get("log"):
        with Path(settings["log"]).open("a") as file:
            file.write(f"{os.getpid()} {text}\n")
