"""The supervisor's handle of a rank: starts its process, receives its report, ends it."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from sandbox.contracts import Preempted, SandboxError
from sandbox.distributed.rank import Rank
from sandbox.distributed.rank_process import RankSpec, run_supervised
from sandbox.distributed.remote_errors import RankError, RankLost, RemoteTraceback
from sandbox.distributed.signals import SIGNALS

WARM = "SANDBOX_WARM"  # variable with the plugins that `sandbox.distributed.preload` imports
RELAY_SECONDS = 1.0  # for the last lines of stderr
SIGNAL_CAUSES = {
    signal.SIGKILL: "the system does so when memory runs out",
    signal.SIGABRT: "NCCL does so when a collective takes longer than the timeout",
}


class RankHandle:
    """One rank: its process, its report (result or error), its stderr."""

    def __init__(self, spec: RankSpec, rank: Rank, preload: Sequence[str]) -> None:
        self.index = rank.index
        self.report: dict[str, Any] | None = None
        self.exited = False  # by itself, not by `end`
        self.failed_at: float | None = None
        self.stopped_polls = 0  # the last calls of `update` that found it stopped
        self._reports, reports = Pipe(duplex=False)
        requests, self._requests = Pipe(duplex=False)
        stderr, err = os.pipe()
        if self.index == 0:
            streams = [_writable(os.dup(1)), _writable(os.dup(2)), _writable(err)]
        else:
            streams = [_writable(os.open(os.devnull, os.O_WRONLY)), _writable(err)]
        self.process = multiprocessing.get_context("forkserver").Process(
            target=run_supervised,
            args=(spec, rank, reports, requests, streams[:2]),
            name=f"rank {self.index}",
        )
        self._relay = threading.Thread(target=_relay, args=(self.index, stderr), daemon=True)
        self._relay.start()
        try:
            with _fork_server(preload):
                self.process.start()
        except (EOFError, OSError) as e:
            raise RankError(
                f"rank {self.index} cannot be started: the process that imports "
                f"{', '.join(preload)} for all ranks has failed; its output is above"
            ) from e
        finally:
            for end in (reports, requests, *streams):
                end.close()

    def get(self, key: str) -> Any:
        """A field of the report; None without it or without a report."""
        return (self.report or {}).get(key)

    @property
    def preempted(self) -> bool:
        return isinstance(self.get("error"), Preempted)

    @property
    def failed(self) -> bool:
        if self.report is None:
            return self.exited
        return "result" not in self.report and not self.preempted

    def request_stop(self, number: int) -> None:
        with suppress(OSError):  # it has exited
            os.write(self._requests.fileno(), bytes([number]))

    def update(self) -> None:
        """Receives the report, and kills what the rank has left when it has exited."""
        has_exited = self.process.exitcode is not None
        self.stopped_polls = self.stopped_polls + 1 if _is_stopped(self.process.pid) else 0
        if self.report is None and self._reports.poll():
            with suppress(EOFError, OSError):  # it exited before its report was complete
                self.report = self._reports.recv()
        if has_exited:
            self._kill_session()
            self.exited = True
        if self.failed and self.failed_at is None:
            self.failed_at = time.monotonic()

    def end(self) -> None:
        """Ends the rank and every process that it has started."""
        if not self.exited:
            self._kill_session()
            self.process.kill()
        self.process.join()
        self._relay.join(RELAY_SECONDS)
        self._reports.close()
        self._requests.close()

    def _kill_session(self) -> None:
        """Only while the rank runs or has just exited, as process ids are reused."""
        with suppress(OSError):  # the session is empty or does not exist yet
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    def error(self) -> SandboxError:
        """The error that ended the rank, as raised here."""
        if self.report is None:
            code = self.process.exitcode
            kind = RankError if code is None or code >= 0 else RankLost
            return kind(f"rank {self.index}: {_exit_reason(code)}")
        error = self.report["error"]
        error.__cause__ = RemoteTraceback(f"rank {self.index}:\n{self.report['trace']}")
        return error


def _relay(index: int, stderr: int) -> None:
    """Relays lines of stderr, prefixed with the rank, until all its writers have exited."""
    with open(stderr, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            sys.stderr.write(f"rank {index}: {line.rstrip()}\n")


def _is_stopped(pid: int | None) -> bool:
    """Whether SIGSTOP holds the process. False where the system has no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _exit_reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exited without a report (exit code {code})"
    name = signal.Signals(-code)
    cause = SIGNAL_CAUSES.get(name)
    return f"killed by {name.name}" + (f" ({cause})" if cause else "")


def _writable(fd: int) -> Connection:
    """A file descriptor in the form that multiprocessing can send."""
    return Connection(fd, readable=False)


# --- the fork server ------------------------------------------------------------------------------

_lock = threading.Lock()


@contextmanager
def _fork_server(preload: Sequence[str]) -> Iterator[None]:
    """Inside the block multiprocessing starts ranks, forked from a server with `preload` imported.

    Ranks do not run the user's main script again, which may lack a `__name__` guard, and do not
    get joblib's start method, which they do not know.
    """
    with _lock:
        _ensure_server(preload)
        main, method = sys.modules["__main__"], multiprocessing.get_start_method(allow_none=True)
        sys.modules["__main__"] = types.ModuleType("__main__")
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            multiprocessing.set_start_method(method, force=True)


def _ensure_server(preload: Sequence[str]) -> None:
    """Starts the fork server unless it runs, with this process's import path.

    The server and its children start with signals blocked: none can end the server, or reach a rank
    before its handlers are installed.
    """
    resource_tracker.ensure_running()  # first, as its start would unblock the signals
    path = os.environ.get("PYTHONPATH")
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.environ["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    try:
        # A broken module would end the server; a broken plugin fails in the rank that needs it.
        modules = [name for name in preload if "/" not in name]
        os.environ[WARM] = " ".join(name for name in preload if "/" in name)
        forkserver.set_forkserver_preload([*modules, "sandbox.distributed.preload"])
        forkserver.ensure_running()
    finally:
        del os.environ[WARM], os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    atexit.unregister(_end_server)
    atexit.register(_end_server)


def _end_server() -> None:
    """Ends the server with this process; by itself it takes seconds, and keeps our stdout open."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    with suppress(ChildProcessError):  # it belongs to the parent that forked this process
        if pid and not multiprocessing.active_children() and os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
