"""The supervisor's handle of a rank: starts its process, receives its report, ends it."""

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, Pipe
from typing import Any

from sandbox.contracts import Preempted, SandboxError
from sandbox.distributed.rank_process import RankSpec, run_supervised
from sandbox.distributed.remote_errors import RemoteTraceback
from sandbox.distributed.signals import SIGNALS

WARM = "SANDBOX_WARM"  # variable with the plugins that `sandbox.distributed.preload` imports
SIGNAL_CAUSES = {
    signal.SIGKILL: "the system does so when memory runs out",
    signal.SIGABRT: "NCCL does so when a collective takes longer than the timeout",
}

ADVICE = (
    "look for a stopped or overloaded process or machine, or raise trainer.timeout; the same "
    "command resumes"
)


class RankError(SandboxError):
    """An unexpected error in a rank; `traceback` is the rank's, if there is one."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message, traceback)

    @property
    def traceback(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return self.args[0]


class RankLost(RankError):
    """A rank was killed from outside or gives no answer: no bug, so no traceback (exit code 5)."""

    exit_code = 5

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        if traceback:
            self.__cause__ = RemoteTraceback(traceback)


def lost_contact(index: int, reason: str) -> RankLost:
    """The error of a rank that another one, or the network, has left alone."""
    return RankLost(
        f"rank {index}: lost contact with the other ranks ({shortened(reason)}); {ADVICE}"
    )


class RankHandle:
    """One rank: its process, its report (result or error), its stderr."""

    def __init__(self, spec: RankSpec, preload: Sequence[str]) -> None:
        self.index = spec.index
        self.report: dict[str, Any] | None = None
        self.exited = False
        self.killed = False  # by the supervisor, after another rank failed
        self.failed_at: float | None = None
        self._partial_line = b""  # of stderr
        self._reports, reports = Pipe(duplex=False)
        requests, self._requests = Pipe(duplex=False)
        self._stderr, err = Pipe(duplex=False)
        if self.index == 0:
            streams = [_writable(os.dup(1)), _writable(os.dup(2))]
        else:
            streams = [_writable(os.open(os.devnull, os.O_WRONLY)), err]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=run_supervised,
            args=(spec, reports, requests, streams),
            name=f"rank {self.index}",
        )
        try:
            with _fork_server(preload):
                self._process.start()
        except (EOFError, OSError) as e:
            raise RankError(
                f"rank {self.index} cannot be started: the process that imports "
                f"{', '.join(preload)} for all ranks has failed; its output is above"
            ) from e
        finally:
            for end in (reports, requests, err, *streams):
                end.close()

    def get(self, key: str) -> Any:
        """A field of the report; None without it or without a report."""
        return (self.report or {}).get(key)

    @property
    def preempted(self) -> bool:
        return self.get("code") == Preempted.exit_code

    @property
    def failed(self) -> bool:
        if self.report is None:
            return self.exited and not self.killed
        return "result" not in self.report and not self.preempted

    def request_stop(self, number: int) -> None:
        with suppress(OSError):  # it has exited
            os.write(self._requests.fileno(), bytes([number]))

    def sources(self) -> list[Any]:
        """What `multiprocessing.connection.wait` waits for."""
        pipes = [p for p in (self._reports, self._stderr) if not p.closed]
        return [] if self.exited else [self._process.sentinel, *pipes]

    def receive(self, ready: Sequence[Any]) -> None:
        """Handles the sources that are ready."""
        exits = self._process.sentinel in ready
        if self._stderr in ready:
            self._relay()
        if self._reports in ready or (exits and not self._reports.closed and self._reports.poll()):
            with suppress(EOFError, OSError):  # it exited before its report was complete
                self.report = pickle.loads(self._reports.recv_bytes())
            self._reports.close()
        if exits:
            self._kill_session()
            self.exited = True
        if self.failed and self.failed_at is None:
            self.failed_at = time.monotonic()

    def end(self) -> None:
        """Ends the rank and every process that it has started."""
        if not self.exited:
            self.killed = True
            self._kill_session()
            self._process.kill()
            self.exited = True
        self._process.join()
        while not self._stderr.closed and self._stderr.poll():
            self._relay()
        if self._partial_line:
            self._write([self._partial_line])
        for pipe in (self._reports, self._requests, self._stderr):
            pipe.close()

    def _kill_session(self) -> None:
        """Only while the rank runs or has just exited, as process ids are reused."""
        with suppress(OSError):  # the session is empty or does not exist yet
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    def _relay(self) -> None:
        """Relays complete lines of stderr, prefixed with the rank."""
        chunk = os.read(self._stderr.fileno(), 1 << 16)
        if not chunk:
            self._stderr.close()
        *lines, self._partial_line = (self._partial_line + chunk).split(b"\n")
        self._write(lines)

    def _write(self, lines: Sequence[bytes]) -> None:
        text = "".join(f"rank {self.index}: {x.decode(errors='replace')}\n" for x in lines)
        sys.stderr.write(text)

    def error(self) -> SandboxError:
        """The error that ended the rank, as raised here."""
        if self.report is None:
            code = self._process.exitcode
            kind = RankError if code is None or code >= 0 else RankLost
            return kind(f"rank {self.index}: {_exit_reason(code)}")
        text, found = self.report["text"], SandboxError(self.report["text"])
        if self.report["error"] and self.report["module"] in sys.modules:
            found = pickle.loads(self.report["error"])
        elif self.report["code"] is not None:  # its class is not imported in this process
            found.exit_code = self.report["code"]  # type: ignore[misc]
        else:
            found = RankError(f"rank {self.index}: {text}", self.report["trace"])
            if self.report["lost_contact"]:
                found = lost_contact(self.index, text)
        found.__cause__ = RemoteTraceback(f"rank {self.index}:\n{self.report['trace']}")
        return found


def shortened(text: str) -> str:
    """The first line of an error of a library."""
    line = text.partition("\n")[0]
    return line if len(line) <= 120 else f"{line[:117]}..."


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
