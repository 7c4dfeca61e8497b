"""Locks of files, for one process at a time; a locked file names the process that holds it.

The system frees a lock when its process dies. Some network file systems have no locks between
machines; therefore the text in the file stays until a holder has released the lock itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sandbox.contracts import ConfigError

COMMAND = "SANDBOX_COMMAND"  # variable with the process id of the command that started this rank

_held: dict[int, Path] = {}  # the locks of this process, by file descriptor


def _drop_locks_in_child() -> None:
    """A forked child (a data worker) would otherwise keep the lock after its parent was killed."""
    while _held:
        os.close(_held.popitem()[0])


os.register_at_fork(after_in_child=_drop_locks_in_child)


class FileLock:
    """The lock of a file, which is created if it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = ""  # the earlier holder on another host, if it has not released the lock
        self._handle: int | None = None
        self._before: tuple[bytes, os.stat_result]  # content and times when it was taken

    @property
    def is_own(self) -> bool:
        """Whether this process holds it."""
        return self.path in _held.values()

    def take(self, seconds: float | None = 0) -> bool:
        """Takes the lock; False where another process holds it, also after `seconds` (None: waits).

        Raises OSError for a file that cannot be written or a file system without locks.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _locked(handle, seconds):
                os.close(handle)
                return False
            self._before = os.pread(handle, 1 << 16, 0), os.fstat(handle)
            earlier = Holder.of(self._before[0])
            self.left = str(earlier) if earlier and not earlier.is_here else ""
            with suppress(OSError):  # the disk is full
                _write(handle, json.dumps(asdict(Holder.current())).encode())
        except OSError:
            os.close(handle)
            raise
        _held[handle], self._handle = self.path, handle
        return True

    def holder(self) -> str:
        """The process that holds the lock, such as "process 12 on host a (since ...)"."""
        with suppress(OSError):
            found = Holder.of(self.path.read_bytes())
            if found and found.may_be_alive():
                return str(found)
        return "another process"

    def release(self, unused: bool = False) -> None:
        """Frees the lock, and removes the holder from the file, whose time of change stays.

        `unused`: the file gets its earlier content.
        """
        if self._handle in _held:  # a forked child has dropped it
            del _held[self._handle]
            with suppress(OSError):
                content, stat = self._before
                _write(self._handle, content if unused else b"")
                os.utime(self._handle, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            os.close(self._handle)
        self._handle = None


@dataclass(frozen=True)
class Holder:
    """What a locked file has as JSON."""

    process: int
    host: str
    since: str

    @classmethod
    def current(cls) -> Holder:
        """This process, or the command that started it."""
        process = int(os.environ.get(COMMAND) or os.getpid())
        return cls(process, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, content: bytes) -> Holder | None:
        """None for another content."""
        try:
            found = json.loads(content)
            return cls(int(found["process"]), str(found["host"]), str(found["since"]))
        except (ValueError, TypeError, KeyError):
            return None

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def may_be_alive(self) -> bool:
        """False where it is a dead process of this host."""
        try:
            if self.is_here:
                os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # of another user
            pass
        return True

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host} (since {self.since})"


@contextmanager
def locked(path: Path, setting: str = "cache") -> Iterator[None]:
    """Lets one process at a time into the block; the others log that they wait.

    Raises ConfigError, which names `setting`, for a folder that cannot be written.
    """
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not lock.take():
            print(f"waiting for {lock.holder()}, which writes {path.name}", flush=True)
            lock.take(None)
    except OSError as e:
        raise ConfigError(
            f"{setting}={path.parent}: cannot be written ({e.strerror}); choose another folder"
        ) from e
    try:
        yield
    finally:
        lock.release()


def _locked(handle: int, seconds: float | None) -> bool:
    """Whether the file could be locked within `seconds`."""
    if seconds is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)


def _write(handle: int, content: bytes) -> None:
    os.pwrite(handle, content, 0)
    os.ftruncate(handle, len(content))
