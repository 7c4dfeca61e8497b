"""Runs several measurements in parallel, each in a forked process.

Not concurrent.futures: `work` is a closure, which a forked process inherits without pickling.
"""

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
    """`work` of each item, in order; results must be picklable.

    Runs sequentially with one core or without fork. Errors are raised as `work` raises them.
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
            children.append(context.Process(target=_send, args=(work, item, far), daemon=True))
            children[-1].start()
            far.close()
            pipes.append((item, near))
        first = work(items[0])
        return [first, *(_receive(work, item, near) for item, near in pipes)]
    finally:  # also after an error, or Ctrl-C
        for child in children:
            if child.pid:
                child.kill()
                child.join()


def _send(work: Callable[[Item], Found], item: Item, pipe: Connection) -> None:
    """Runs in the forked process. An error closes the pipe, and the parent repeats the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills it
    torch.set_num_threads(1)  # thread pools do not survive a fork
    try:
        pipe.send(work(item))
    except Exception:  # the parent repeats the work and raises it
        pipe.close()


def _receive(work: Callable[[Item], Found], item: Item, pipe: Connection) -> Found:
    try:
        return pipe.recv()
    except EOFError:
        return work(item)
    finally:
        pipe.close()
