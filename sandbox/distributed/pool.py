"""The same function on many jobs, in several processes or on a Ray cluster, in the order of jobs.

What comes out does not depend on how many workers there are. Few jobs are under way at a time, so
that memory does not grow with their number. A job whose process dies (a decoder that crashes) is
tried alone once more, and then is a `Crashed` in place of its result.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from sandbox.contracts import ConfigError
from sandbox.distributed.remote_errors import FarTraceback, survives

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


@dataclass
class _Task:
    """One job, with its function in the bytes that a worker gets; `said` is what has come back."""

    words: bytes
    begun: bool = False
    crashes: int = 0
    said: tuple[Any, BaseException | None, str] | None = None


class _Worker:
    """A process that does one job at a time, so that it is known which one has ended it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_work, args=(far,))
        self.process.start()
        far.close()
        self.task: _Task | None = None

    def sources(self) -> list[Any]:
        """What `wait` looks at."""
        return [self.pipe, self.process.sentinel]

    def begin(self, task: _Task) -> None:
        """Raises OSError where the process has ended."""
        self.task, task.begun = task, True
        self.pipe.send_bytes(task.words)

    def hear(self) -> None:
        """Takes in the result. Raises EOFError or OSError where the process has ended instead."""
        assert self.task
        if not self.pipe.poll():
            raise EOFError
        self.task.said = pickle.loads(self.pipe.recv_bytes())
        self.task = None

    def leave(self) -> None:
        """Lets it end, after a job that it may be at."""
        self.pipe.close()
        self.process.join()


class _Local:
    """Workers that are started as they are needed, looked after by the thread that asks alone.

    (ProcessPoolExecutor has a thread for that, which in Python 3.11 may take its pool apart while
    a job is handed in: then that fails with "handle is closed", or is waited for without end.)
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.workers: list[_Worker] = []

    def stop(self) -> None:
        for worker in self.workers:
            worker.pipe.close()  # of all before it waits for one
        while self.workers:
            self.workers.pop().leave()

    def ordered(self, function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
        tasks: deque[_Task] = deque()
        for job in jobs:
            tasks.append(_Task(pickle.dumps((function, job))))
            self.look_after(tasks, 0)
            if len(tasks) >= AHEAD * self.count:
                yield self.first(tasks)
        while tasks:
            yield self.first(tasks)

    def first(self, tasks: deque[_Task]) -> Any:
        """The result of the first task, when it is there; raises its error."""
        self.look_after(tasks, 0)
        while tasks[0].said is None:
            self.look_after(tasks, None)
        result, error, trace = tasks.popleft().said or (None, None, "")
        if error is not None:
            raise error from FarTraceback(trace)
        return result

    def look_after(self, tasks: Iterable[_Task], patience: float | None) -> None:
        """Takes in what is done, for which it waits up to `patience` seconds, and begins others."""
        busy = [w for w in self.workers if w.task]
        ready = wait([s for w in busy for s in w.sources()], patience) if busy else []
        for worker in busy:
            if not {*worker.sources()}.isdisjoint(ready):
                try:
                    worker.hear()
                except (EOFError, OSError):
                    self.lose(worker)
        for task in tasks:
            if not task.begun and not self.give(task):
                return

    def give(self, task: _Task) -> bool:
        """Begins it, where there is a worker for it: whether there was one.

        A job that has ended a process is alone in its second try: it may be for want of memory.
        """
        running = [w.task for w in self.workers if w.task]
        is_alone = any(t.crashes for t in (*running, task))
        if len(running) >= (1 if is_alone else self.count):
            return False
        worker = next((w for w in self.workers if not w.task), None)
        if worker is None:
            self.workers.append(worker := _Worker())
        try:
            worker.begin(task)
        except OSError:
            self.lose(worker)
        return True

    def lose(self, worker: _Worker) -> None:
        """Its process has ended, and its task begins once more, or is given up."""
        self.workers.remove(worker)
        worker.leave()
        task = worker.task
        assert task
        task.crashes += 1
        if task.crashes == 2:
            task.said = Crashed(), None, ""
        else:
            task.begun = False


def _work(pipe: Connection) -> None:
    """A worker: Ctrl-C is for the command, and where that is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    with suppress(EOFError, OSError):  # there are no more jobs, or nobody waits for this one's end
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(words: bytes) -> bytes:
    """The result of a job, its error and that error's traceback."""
    try:
        function, job = pickle.loads(words)
        return pickle.dumps((function(job), None, ""))
    except Exception as e:  # whatever it is, the command raises it
        told = e if survives(e) else RuntimeError(f"{type(e).__name__}: {e}")
        return pickle.dumps((None, told, traceback.format_exc()))


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
    # None would be another's cluster, where "ray start" has begun one on this machine.
    ray.init(address or "local", log_to_driver=False, runtime_env=environment, **own)
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
