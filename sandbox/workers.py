"""The same function on many jobs, in several processes or on a Ray cluster, in the order of jobs.

What comes out does not depend on how many workers there are. Few jobs are under way at a time, so
that memory does not grow with their number. A job whose process dies (a decoder that crashes) is
tried alone once more, and then is a `Crashed` in place of its result.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from sandbox.contracts import ConfigError

AHEAD = 4  # jobs under way for each worker

Function = Callable[[Any], Any]  # at the top of a module; what goes in and out can be pickled
Ordered = Callable[[Function, Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Crashed:
    """In place of the result of a job that ended its process."""


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def started(engine: str, count: int, address: str | None = None) -> Iterator[Ordered]:
    """What runs a function on jobs: `engine` "local" (count 0: in this process) or "ray"."""
    if engine == "ray":
        with _ray(count, address) as ordered:
            yield ordered
    elif count == 0:
        yield map
    else:
        pool = _Local(count)
        try:
            yield pool.ordered
        finally:
            pool.stop()


# --- processes on this machine --------------------------------------------------------------------


class _Local:
    def __init__(self, count: int) -> None:
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, function: Function, job: Any) -> Future[Any]:
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.count, context, _begin)
        try:
            return self.pool.submit(function, job)
        except BrokenProcessPool as e:  # by a job before this one, whose result says so, too
            broken: Future[Any] = Future()
            broken.set_exception(e)
            return broken

    def stop(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None

    def ordered(self, function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        for job in jobs:
            waiting.append((job, self.submit(function, job)))
            if len(waiting) >= AHEAD * self.count:
                yield from self.results(function, waiting, 1)
        yield from self.results(function, waiting, len(waiting))

    def results(
        self, function: Function, waiting: deque[tuple[Any, Future[Any]]], count: int
    ) -> Iterator[Any]:
        """Those of the first `count` that wait; of all, where one of them ended its process."""
        for _ in range(count):
            try:
                yield waiting[0][1].result()
                waiting.popleft()
            except BrokenProcessPool:
                self.stop()
                yield from [self.alone(function, job) for job, _ in waiting]
                waiting.clear()
                return

    def alone(self, function: Function, job: Any) -> Any:
        try:
            return self.submit(function, job).result()
        except BrokenProcessPool:
            self.stop()
            return Crashed()


def _begin() -> None:
    """In a worker: Ctrl-C is for the command, and where that is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


# --- Ray ------------------------------------------------------------------------------------------


@contextmanager
def _ray(count: int, address: str | None) -> Iterator[Ordered]:
    """`address`: of a cluster that is there, "auto" for the one of this machine; null begins one.

    On other machines of a cluster the checkout and the folders must be at the same places.
    """
    try:
        import ray
    except ImportError as e:
        raise ConfigError("task.engine=ray: ray is not installed; use the extra sweep") from e
    own = {} if address else {"num_cpus": max(count, 1), "include_dashboard": False}
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(address, log_to_driver=False, runtime_env=environment, **own)
    try:
        ahead = AHEAD * max(count, 1)
        # a process that ends is Ray's to start again; a job that ends three of them is given up
        remote = ray.remote(max_retries=2, num_cpus=1)(_call)

        def ordered(function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Any] = deque()
            for job in jobs:
                waiting.append(remote.remote(function, job))
                if len(waiting) >= ahead:
                    yield _got(waiting.popleft())
            while waiting:
                yield _got(waiting.popleft())

        yield ordered
    finally:
        ray.shutdown()


def _call(function: Function, job: Any) -> Any:
    return function(job)


def _got(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    try:
        return ray.get(reference)
    except WorkerCrashedError:
        return Crashed()
    except RayTaskError as e:
        raise e.cause from e
