"""Runs several measurements in parallel, each in a forked process."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import torch

from sandbox.distributed.pool import cores, exit_with_parent

Item = TypeVar("Item")
Found = TypeVar("Found")
_shared: dict[str, Callable[..., Any]] = {}  # in a forked process: the work


def parallel_map(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` of each item, in order. Items and results must be picklable; `work` is inherited.

    Runs sequentially with one core, without fork, and again after any error in a process: autograd
    cannot be forked once it has run. Errors are raised as `work` raises them.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    is_child = multiprocessing.current_process().daemon
    if len(items) > 1 and cores() > 1 and can_fork and not is_child:
        context = multiprocessing.get_context("fork")
        with (
            suppress(Exception),
            ProcessPoolExecutor(len(items), context, _begin, (work,)) as pool,
        ):
            return list(pool.map(_work, items))
    return [work(item) for item in items]


def _begin(work: Callable[..., Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    exit_with_parent()
    torch.set_num_threads(1)  # thread pools do not survive a fork
    _shared["work"] = work


def _work(item: Any) -> Any:
    return _shared["work"](item)
