"""Several measurements at once, each in a process that is forked for it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from sandbox.distributed.pool import cores

Item = TypeVar("Item")
Found = TypeVar("Found")


def side_by_side(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of each item, in their order; what it finds must pickle.

    One after the other where there is one core, or no fork. An error is raised as `work` raises it.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    is_child = multiprocessing.current_process().daemon
    if len(items) < 2 or cores() < 2 or is_child or not can_fork:
        return [work(item) for item in items]
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    try:
        for item in items[1:]:
            near, far = context.Pipe(duplex=False)
            children.append(context.Process(target=_tell, args=(work, item, far), daemon=True))
            children[-1].start()
            far.close()
            pipes.append((item, near))
        first = work(items[0])
        return [first, *(_heard(work, item, near) for item, near in pipes)]
    finally:  # also after an error, or Ctrl-C
        for child in children:
            if child.pid:
                child.kill()
                child.join()


def _tell(work: Callable[[Item], Found], item: Item, pipe: Connection) -> None:
    """What a forked process does. An error closes the pipe: the parent sees it for itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its parent
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    try:
        pipe.send(work(item))
    except Exception:  # whatever it is, the parent runs into it and says it
        pipe.close()


def _heard(work: Callable[[Item], Found], item: Item, pipe: Connection) -> Found:
    try:
        return pipe.recv()
    except EOFError:
        return work(item)
    finally:
        pipe.close()
