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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import LifoQueue
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
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def started(engine: str, count: int, address: str | None = None) -> AbstractContextManager[Ordered]:
    """Starts workers; the context is an ordered `map`. `engine`: "local" or "ray".

    A `count` of 0 runs local jobs in this process.
    """
    if engine == "ray":
        return _ray(count, address)
    return _local(count) if count else nullcontext(map)


def _prefetched(count: int, start: Callable[[Function, Any], Any], result: Function) -> Ordered:
    """An ordered `map`: `result` waits for what `start` returns."""

    def ordered(function: Function, jobs: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for job in jobs:
            waiting.append(start(function, job))
            if len(waiting) >= AHEAD * count:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())

    return ordered


# --- processes on this machine --------------------------------------------------------------------


@contextmanager
def _local(count: int) -> Iterator[Ordered]:
    """Threads that run each job in its own process, so that a crash has one cause.

    (ProcessPoolExecutor would lose the jobs of all processes with each crash. In Python 3.11 it may
    hang where a job is submitted while its manager thread dismantles a broken pool.)
    """
    running: set[Future[Any]] = set()
    workers: LifoQueue[tuple[BaseProcess, Connection] | None] = LifoQueue()
    for _ in range(count):
        workers.put(None)  # started when needed

    def call(task: bytes) -> Any:
        process, pipe = workers.get() or _start_worker()
        try:
            pipe.send_bytes(task)
            result, error, trace = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the process has ended
            process.join()
            workers.put(None)
            return Crashed()
        workers.put((process, pipe))
        if error is not None:
            raise error from RemoteTraceback(trace)
        return result

    def start(function: Function, job: Any) -> tuple[bytes, Future[Any]]:
        task = pickle.dumps((function, job))
        running.add(future := threads.submit(call, task))
        return task, future

    def result(started: tuple[bytes, Future[Any]]) -> Any:
        task, future = started
        running.discard(future)
        if not isinstance(found := future.result(), Crashed):
            return found
        wait(running)  # the retry may need the memory of all workers
        return call(task)

    threads = ThreadPoolExecutor(count)
    try:
        yield _prefetched(count, start, result)
    finally:
        threads.shutdown(cancel_futures=True)
        found = [worker for worker in workers.queue if worker]
        for _, pipe in found:
            pipe.close()  # all of them before the first wait
        for process, _ in found:
            process.join()


def _start_worker() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=_run_jobs, args=(child,))
    process.start()
    child.close()
    return process, pipe


def _run_jobs(pipe: Connection) -> None:
    """The main function of a worker. It ignores Ctrl-C and ends with its parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    with suppress(EOFError, OSError):  # there are no more jobs
        while True:
            pipe.send_bytes(_outcome(pipe.recv_bytes()))


def _outcome(task: bytes) -> bytes:
    """Runs a job; returns its pickled (result, error, traceback)."""
    try:
        function, job = pickle.loads(task)
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

    try:
        yield _prefetched(max(count, 1), remote.remote, result)
    finally:
        ray.shutdown()


def _call(function: Function, job: Any) -> Any:
    return function(job)
