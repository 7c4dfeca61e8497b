"""Runs a function on many jobs, in several processes or on a Ray cluster; results keep the order.

Results do not depend on the number of workers. Few jobs are in progress at a time, so that memory
does not grow with their number. A job that ends its process (a decoder that crashes) is retried
once, alone; if it crashes again, its result is a `Crashed`.
"""

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
from sandbox.distributed.remote_errors import RemoteTraceback, is_picklable

AHEAD = 4  # jobs in progress per worker

Function = Callable[[Any], Any]  # at the top of a module; arguments and results can be pickled
Ordered = Callable[[Function, Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Crashed:
    """The result of a job that ended its process twice."""


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_with_parent() -> None:
    """Ends this process when its parent process ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def started(engine: str, count: int, address: str | None = None) -> Iterator[Ordered]:
    """Starts workers and yields an ordered `map`. `engine`: "local" or "ray".

    A `count` of 0 runs local jobs in this process.
    """
    if engine == "ray":
        with _ray(count, address) as ordered:
            yield ordered
    elif count == 0:
        yield map
    else:
        pool = _LocalPool(count)
        try:
            yield pool.ordered
        finally:
            pool.stop()


# --- processes on this machine --------------------------------------------------------------------


@dataclass
class _Task:
    """A job and its function, pickled; `outcome` is (result, error, traceback) when it is done."""

    payload: bytes
    is_running: bool = False
    crashes: int = 0
    outcome: tuple[Any, BaseException | None, str] | None = None


class _Worker:
    """A process that runs one job at a time, so that a crash has one possible cause."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=_run_jobs, args=(child,))
        self.process.start()
        child.close()
        self.task: _Task | None = None

    def sources(self) -> list[Any]:
        """What `multiprocessing.connection.wait` waits for."""
        return [self.pipe, self.process.sentinel]

    def start(self, task: _Task) -> None:
        """Raises OSError where the process has ended."""
        self.task, task.is_running = task, True
        self.pipe.send_bytes(task.payload)

    def receive(self) -> None:
        """Takes the outcome. Raises EOFError or OSError where the process has ended instead."""
        assert self.task
        if not self.pipe.poll():
            raise EOFError
        self.task.outcome = pickle.loads(self.pipe.recv_bytes())
        self.task = None

    def join(self) -> None:
        """Waits for the current job and ends the process."""
        self.pipe.close()
        self.process.join()


class _LocalPool:
    """Workers, started when needed and served by the calling thread alone.

    (ProcessPoolExecutor has a manager thread, which in Python 3.11 may dismantle a broken pool
    while a job is submitted: that fails with "handle is closed" or never returns.)
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.workers: list[_Worker] = []

    def stop(self) -> None:
        for worker in self.workers:
            worker.pipe.close()  # all of them before the first wait
        while self.workers:
            self.workers.pop().join()

    def ordered(self, function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
        tasks: deque[_Task] = deque()
        for job in jobs:
            tasks.append(_Task(pickle.dumps((function, job))))
            self.update(tasks, 0)
            if len(tasks) >= AHEAD * self.count:
                yield self.first(tasks)
        while tasks:
            yield self.first(tasks)

    def first(self, tasks: deque[_Task]) -> Any:
        """Waits for the result of the first task; raises its error."""
        self.update(tasks, 0)
        while tasks[0].outcome is None:
            self.update(tasks, None)
        result, error, trace = tasks.popleft().outcome or (None, None, "")
        if error is not None:
            raise error from RemoteTraceback(trace)
        return result

    def update(self, tasks: Iterable[_Task], timeout: float | None) -> None:
        """Receives outcomes, waiting up to `timeout` seconds, and starts tasks."""
        busy = [w for w in self.workers if w.task]
        ready = wait([s for w in busy for s in w.sources()], timeout) if busy else []
        for worker in busy:
            if not {*worker.sources()}.isdisjoint(ready):
                try:
                    worker.receive()
                except (EOFError, OSError):
                    self.remove(worker)
        for task in tasks:
            if not task.is_running and not self.start(task):
                return

    def start(self, task: _Task) -> bool:
        """Starts a task if a worker is free; returns whether one was.

        The retry of a task that crashed runs alone: it may need the memory of all workers.
        """
        running = [w.task for w in self.workers if w.task]
        is_alone = any(t.crashes for t in (*running, task))
        if len(running) >= (1 if is_alone else self.count):
            return False
        worker = next((w for w in self.workers if not w.task), None)
        if worker is None:
            self.workers.append(worker := _Worker())
        try:
            worker.start(task)
        except OSError:
            self.remove(worker)
        return True

    def remove(self, worker: _Worker) -> None:
        """Removes a worker that has ended; its task is retried once."""
        self.workers.remove(worker)
        worker.join()
        task = worker.task
        assert task
        task.crashes += 1
        task.is_running = task.crashes == 2
        if task.crashes == 2:
            task.outcome = Crashed(), None, ""


def _run_jobs(pipe: Connection) -> None:
    """The main function of a worker. It ignores Ctrl-C and ends with its parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    with suppress(EOFError, OSError):  # there are no more jobs
        while True:
            pipe.send_bytes(_outcome(pipe.recv_bytes()))


def _outcome(payload: bytes) -> bytes:
    """Runs a job; returns its pickled (result, error, traceback)."""
    try:
        function, job = pickle.loads(payload)
        return pickle.dumps((function(job), None, ""))
    except Exception as e:  # raised again in the parent process
        error = e if is_picklable(e) else RuntimeError(f"{type(e).__name__}: {e}")
        return pickle.dumps((None, error, traceback.format_exc()))


# --- Ray ------------------------------------------------------------------------------------------


@contextmanager
def _ray(count: int, address: str | None) -> Iterator[Ordered]:
    """`address`: of a running cluster, "auto" for the one on this machine; None starts a new one.

    On other machines of a cluster the checkout and the folders must have the same paths.
    """
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError as e:
        raise ConfigError("task.engine=ray: ray is not installed; use the extra sweep") from e
    own = {} if address else {"num_cpus": max(count, 1), "include_dashboard": False}
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    # None would connect to a cluster that "ray start" has started on this machine.
    ray.init(address or "local", log_to_driver=False, runtime_env=environment, **own)
    # Ray restarts a process that ends; a job that ends three of them is given up
    remote = ray.remote(max_retries=2, num_cpus=1)(_call)

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except WorkerCrashedError:
            return Crashed()
        except RayTaskError as e:
            raise e.cause from e

    def ordered(function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for job in jobs:
            waiting.append(remote.remote(function, job))
            if len(waiting) >= AHEAD * max(count, 1):
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())

    try:
        yield ordered
    finally:
        ray.shutdown()


def _call(function: Function, job: Any) -> Any:
    return function(job)
