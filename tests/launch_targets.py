"""What ranks do in the tests of the supervisor: small functions, found by this module's name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sandbox.contracts import DataError, Diverged, Misfit, Preempted
from sandbox.rank import Rank


def facts(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """What a rank finds around it."""
    import torch

    return {
        "settings": settings,
        "ranks": [rank.index, rank.local, rank.world, rank.local_world],
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "folder": os.getcwd(),
        "pid": os.getpid(),
        "session": os.getsid(0),
        "default_group": torch.distributed.is_initialized(),
    }


def greet(settings: dict[str, Any], rank: Rank) -> list[Any]:
    """What all ranks have in common, and a word of each on stdout and stderr."""
    print(f"stdout of {rank.index}", flush=True)
    print(f"stderr of {rank.index}", file=sys.stderr, flush=True)
    rank.barrier()
    return rank.broadcast_plain([rank.index, settings])


def fail(settings: dict[str, Any], rank: Rank) -> None:
    """Rank `settings["rank"]` ends in the way `settings["how"]` and the others wait for it."""
    rank.barrier()
    if rank.index == settings["rank"]:
        note(settings, "failing")
        how = settings["how"]
        if how == "error":
            raise ValueError("planned failure")
        if how == "diverged":
            raise Diverged("step 3: loss=nan is not finite")
        if how == "misfit":
            raise Misfit("frames", 7, "4 k + 1")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leave":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        if how == "own":
            raise Stranger("planned", 4)
        if how == "exit":
            sys.exit("left early")
    for _ in range(10**6):
        rank.barrier()


class Stranger(Exception):
    """Does not survive pickling: its arguments are not those of its base class."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(f"{what} of size {size}")


def count(settings: dict[str, Any], rank: Rank) -> None:
    """Steps until it is asked to stop; all ranks stop at the same one."""
    for step in range(10**6):
        if rank.index == 0 and step == 2:
            note(settings, "stepping")
        time.sleep(0.01)
        if why := rank.agree_to_stop():
            note(settings, f"rank {rank.index} stopped after {step}")
            raise Preempted(f"stopped by {why}")


def deaf(settings: dict[str, Any], rank: Rank) -> None:
    """Never asks whether it shall stop."""
    note(settings, "stepping")
    time.sleep(600)


def note(settings: dict[str, Any], text: str) -> None:
    """Adds a line to the file `settings["log"]`, with this process."""
    if "log" in settings:
        with Path(settings["log"]).open("a") as file:
            file.write(f"{os.getpid()} {text}\n")


def no_data(settings: dict[str, Any], rank: Rank) -> None:
    raise DataError("no clips")
