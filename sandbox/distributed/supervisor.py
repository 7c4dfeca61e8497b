"""The supervisor: starts the ranks of a run, hears their last words, and leaves none behind.

The process that calls `launch` never trains and imports no torch. Ranks are forked from a server
that has made the heavy imports once, so a later job of the same process starts in a moment. They
get plain settings and the whole environment, meet in a file and use no port; the first rank that
fails is named with its own error, and none outlives the supervisor, however that ends.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, Any

from sandbox.contracts import ConfigError, Preempted, SandboxError
from sandbox.distributed import rank
from sandbox.distributed.rank import SIGNALS, Order, Rank, plain
from sandbox.distributed.remote_errors import FarTraceback

if TYPE_CHECKING:
    from sandbox.config.root import Root

PRELOAD = (
    "torch",
    "lightning.pytorch",
    "hydra._internal.hydra",
    "sandbox.weights.init_from",
    "sandbox.training.finish",
    "sandbox.training.build",
    "sandbox.tasks.train",
    "sandbox.tasks.train_vae",
    "sandbox.training.loop",
    "sandbox.training.state",
    "av",
    "einops",
    "safetensors.torch",
)
LEFT_OVER = (  # of another launcher: not for our ranks
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "PL_GLOBAL_SEED",
)
MEETINGS = 3  # how often ranks are started that do not find one another
WARM = "SANDBOX_WARM"  # what `sandbox.distributed.preload` reads
GRACE = 3.0  # seconds that the others have once a rank has failed
LEAVING = 10.0  # and all have after their last word
MEANING = {
    signal.SIGKILL: "the system does so when memory runs out",
    signal.SIGABRT: "NCCL does so when a collective takes longer than the timeout",
}


class RankError(SandboxError):
    """A rank failed in a way that nobody foresaw; `traceback` is the rank's, where it has one."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message, traceback)

    @property
    def traceback(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return self.args[0]


_in_process: ContextVar[bool] = ContextVar("in_process", default=False)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Inside the block a run of one process is this one, as notebooks want it."""
    token = _in_process.set(True)
    try:
        yield
    finally:
        _in_process.reset(token)


def launch_run(target: str, root: Root, overrides: Sequence[str], group: str | None) -> Any:
    """`launch` of a run with the processes that its configuration asks for.

    The settings of `target` are "root" (the whole configuration), "overrides" as they were typed,
    and "group", the name of a multirun or None.
    """
    from sandbox.config.root import to_container

    trainer = root.trainer
    parts = [cfg for _, cfg in root.parts()]
    imports = [name for cfg in parts for name in (*cfg.imports, cfg.plugin)]
    return launch(
        target,
        {"root": to_container(root), "overrides": [*overrides], "group": group},
        trainer.processes,
        device=trainer.accelerator,
        timeout=trainer.timeout,
        threads=trainer.threads,
        preload=[*dict.fromkeys((*PRELOAD, *imports))],
        in_process=_in_process.get() and trainer.processes == 1,
    )


def launch(
    target: str,
    settings: Any,
    processes: int = 1,
    *,
    device: str = "cpu",
    timeout: float = 600.0,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    preload: Sequence[str] = PRELOAD,
    in_process: bool = False,
) -> Any:
    """Calls `target`, "module:function", as function(settings, rank) in each rank.

    `settings` and the result, that of rank 0, are plain containers. `device` is "cpu", "cuda",
    where rank r has the r-th GPU, or "auto"; `timeout` is how long (seconds) a rank waits for the
    others; `threads` of torch in each rank are by default a fair share of the cores; `environment`
    is added to the present one; `preload` are modules and plugins that are imported once for all
    ranks of this process, by its first call. With `in_process` the one rank is this process, and so
    it is where torchrun or srun started this process as a rank.

    Raises a rank's SandboxError as it is (Preempted where the ranks were asked to stop), RankError
    for any other end, and KeyboardInterrupt at the third signal. The cause of every error is its
    FarTraceback.
    """
    plain(settings, "settings")
    outside = rank.place(os.environ)
    if outside is not None:
        if processes != outside["world"]:
            raise ConfigError(
                f"trainer.processes={processes}: this is rank {outside['index']} of "
                f"{outside['world']} that torchrun or srun started; want {outside['world']}"
            )
        return rank.serve_outside(
            Order(target, settings, **outside, device=device, timeout=timeout, threads=threads)
        )
    if in_process:
        if processes != 1:
            raise ConfigError(f"trainer.processes={processes}: want 1 in process")
        order = Order(target, settings, device=device, timeout=timeout, threads=threads)
        return rank.work(order, Rank())
    environ = {k: v for k, v in os.environ.items() if k not in LEFT_OVER} | dict(environment or {})
    if sys.platform == "linux":
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are here, whatever the host is called
    threads = threads or _share(environ, processes)
    members: list[_Member] = []
    for left in reversed(range(MEETINGS)):
        members = []
        with _folder() as folder, _Stop(members) as stop:
            try:
                for i in range(processes):
                    order = Order(
                        target, settings, i, processes, i, processes,
                        device=device, timeout=timeout, threads=threads,
                        meeting=f"file://{folder}/store", folder=folder, environment=environ,
                    )  # fmt: skip
                    members.append(_Member(order, preload))
                    stop.pass_on()
                _watch(members, stop.woken)
            finally:
                for member in members:
                    member.end()
        if not left or stop.signals or not _not_met(members):
            break
        sys.stderr.write(f"the processes did not connect: they start again ({left} more)\n")
    return _outcome(members)


def _share(environ: Mapping[str, str], processes: int) -> int:
    """Torch threads of a rank; the variable itself comes too late for a forked rank."""
    if environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(environ["OMP_NUM_THREADS"]))
    from sandbox.distributed.pool import cores

    return max(1, cores() // processes)


@contextmanager
def _folder() -> Iterator[str]:
    """An empty folder where ranks meet, in memory where possible: TMPDIR may be a network disk."""
    memory = "/dev/shm"
    there = memory if os.access(memory, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="sandbox-ranks-", dir=there)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- asking to stop -------------------------------------------------------------------------------


class _Stop:
    """Inside the block a signal asks the ranks to stop; the third one raises KeyboardInterrupt.

    `woken` can be read from when one has come. Without it a signal that comes just before this
    thread waits, or meets another thread, would be heard when the wait is over, which may be never.
    """

    def __init__(self, members: list[_Member]) -> None:
        self.members = members
        self.signals: list[int] = []

    def __enter__(self) -> _Stop:
        self.woken, self._wakes = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(self._wakes, False)
        self.before, self.woke = rank.handlers(), rank.wake(self._wakes)
        rank.handle(dict.fromkeys(self.before, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        rank.handle(self.before)
        rank.wake(self.woke)
        os.close(self.woken)
        os.close(self._wakes)

    def _note(self, number: int, frame: object) -> None:
        self.signals.append(number)
        if len(self.signals) == 3:
            raise KeyboardInterrupt
        if len(self.signals) == 1:
            rank.say("stopping after this step; the third time it stops at once")
        self.pass_on()

    def pass_on(self) -> None:
        """Tells the ranks that are there of the first signal, if one has come."""
        if self.signals:
            for member in self.members:
                member.ask(self.signals[0])


# --- a rank, seen from the supervisor -------------------------------------------------------------


class _Member:
    """The supervisor's end of one rank: its process, its last word, its stderr."""

    def __init__(self, order: Order, preload: Sequence[str]) -> None:
        self.index = order.index
        self.word: dict[str, Any] | None = None
        self.left = False
        self.killed = False  # by us, because others had failed
        self.failed_at: float | None = None
        self._said = b""  # the begin of a line on stderr
        self._hears, word = Pipe(duplex=False)
        orders, self._orders = Pipe(duplex=False)
        self._stderr, err = Pipe(duplex=False)
        if self.index == 0:
            streams = [_writable(os.dup(1)), _writable(os.dup(2))]
        else:
            streams = [_writable(os.open(os.devnull, os.O_WRONLY)), err]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=rank.serve, args=(order, word, orders, streams), name=f"rank {self.index}"
        )
        try:
            with _starting(preload):
                self._process.start()
        except (EOFError, OSError) as e:
            raise RankError(
                f"rank {self.index} cannot be started: the process that imports "
                f"{', '.join(preload)} for all ranks has failed; its own words are above"
            ) from e
        finally:
            for end in (word, orders, err, *streams):
                end.close()

    @property
    def preempted(self) -> bool:
        return self.word is not None and self.word.get("code") == Preempted.exit_code

    @property
    def lost_contact(self) -> bool:
        return self.word is not None and self.word.get("lost_contact", False)

    @property
    def not_met(self) -> bool:
        return self.word is not None and self.word.get("not_met", False)

    @property
    def died(self) -> bool:
        """Whether it ended without a word, and not by our hand."""
        return self.left and self.word is None and not self.killed

    @property
    def failed(self) -> bool:
        has_error = self.word is not None and "result" not in self.word
        return self.died or (has_error and not self.preempted)

    def ask(self, number: int) -> None:
        """Asks it to stop because of a signal."""
        with suppress(OSError):  # it has ended
            os.write(self._orders.fileno(), bytes([number]))

    def sources(self) -> list[Any]:
        """What `wait` looks at."""
        pipes = [p for p in (self._hears, self._stderr) if not p.closed]
        return [] if self.left else [self._process.sentinel, *pipes]

    def hear(self, ready: Sequence[Any]) -> None:
        """Takes in what has come from it."""
        leaves = self._process.sentinel in ready
        if self._stderr in ready:
            self._relay()
        if self._hears in ready or (leaves and not self._hears.closed and self._hears.poll()):
            with suppress(EOFError, OSError):  # it has ended before or within its last word
                self.word = pickle.loads(self._hears.recv_bytes())
            self._hears.close()
        if leaves:
            self._sweep()
            self.left = True
        if self.failed and self.failed_at is None:
            self.failed_at = time.monotonic()

    def end(self) -> None:
        """Leaves nothing of it: neither its process nor what that has started."""
        if not self.left:
            self.killed = True
            self._sweep()
            self._process.kill()
            self.left = True
        self._process.join()
        while not self._stderr.closed and self._stderr.poll():
            self._relay()
        if self._said:
            self._write([self._said])
        for pipe in (self._hears, self._orders, self._stderr):
            pipe.close()

    def _sweep(self) -> None:
        """Ends what is in its session; only while it runs or has just ended, as numbers return."""
        with suppress(OSError):  # nothing is left, or it has no session of its own yet
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    def _relay(self) -> None:
        """Passes on whole lines of stderr, with the rank in front."""
        chunk = os.read(self._stderr.fileno(), 1 << 16)
        if not chunk:
            self._stderr.close()
        *lines, self._said = (self._said + chunk).split(b"\n")
        self._write(lines)

    def _write(self, lines: Sequence[bytes]) -> None:
        text = "".join(f"rank {self.index}: {x.decode(errors='replace')}\n" for x in lines)
        sys.stderr.write(text)

    def error(self) -> SandboxError:
        """Why it failed."""
        if self.word is None:
            return RankError(f"rank {self.index}: {_end_of(self._process.exitcode)}")
        found: SandboxError
        if self.word["itself"] and self.word["module"] in sys.modules:
            found = pickle.loads(self.word["itself"])
        elif self.word["code"] is not None:  # of a class that is not there in this process
            found = SandboxError(self.word["text"])
            found.exit_code = self.word["code"]  # type: ignore[misc]
        else:
            text = self.word["text"]
            if self.lost_contact:
                text = f"lost contact with the other ranks ({text})"
            found = RankError(f"rank {self.index}: {text}", self.word["trace"])
        found.__cause__ = FarTraceback(f"rank {self.index}:\n{self.word['trace']}")
        return found


def _end_of(code: int | None) -> str:
    """What an exit code without a last word means."""
    if code is None or code >= 0:
        return f"ended without a word (exit code {code})"
    name = signal.Signals(-code)
    meaning = MEANING.get(name)
    return f"killed by {name.name}" + (f" ({meaning})" if meaning else "")


def _writable(handle: int) -> Connection:
    """A file handle in the form in which multiprocessing passes it on."""
    return Connection(handle, readable=False)


_lock = threading.Lock()


@contextmanager
def _starting(preload: Sequence[str]) -> Iterator[None]:
    """Inside the block multiprocessing starts processes as ranks want them.

    They do not run the user's script again, which need not be guarded by `__name__`, and are not
    told of joblib's start method, which they do not know.
    """
    with _lock:
        _serve(preload)
        main, method = sys.modules["__main__"], multiprocessing.get_start_method(allow_none=True)
        sys.modules["__main__"] = types.ModuleType("__main__")
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            multiprocessing.set_start_method(method, force=True)


def _serve(preload: Sequence[str]) -> None:
    """Has the server run that ranks are forked from.

    It finds the modules where this process does. It and every rank begin with signals blocked, so
    that none ends the server or meets a rank before that has its handlers.
    """
    resource_tracker.ensure_running()  # first, as its start would unblock them
    path = os.environ.get("PYTHONPATH")
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.environ["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    try:
        # A broken module would end the server; a broken plugin is left to the rank that needs it.
        modules = [name for name in preload if "/" not in name]
        os.environ[WARM] = " ".join(name for name in preload if "/" in name)
        forkserver.set_forkserver_preload([*modules, "sandbox.distributed.preload"])
        forkserver.ensure_running()
    finally:
        del os.environ[WARM]
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    atexit.unregister(_end_server)
    atexit.register(_end_server)


def _end_server() -> None:
    """Ends the server with this process; by itself it takes seconds, and holds our stdout open."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    with suppress(ChildProcessError):  # it is that of a process which has forked this one
        if pid and not multiprocessing.active_children() and os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)


# --- how it ends ----------------------------------------------------------------------------------


def _watch(members: Sequence[_Member], woken: int) -> None:
    """Waits until every rank has left; after a failure only a moment."""
    deadline: float | None = None
    while any(not m.left for m in members):
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([woken, *(s for m in members for s in m.sources())], patience)
        if woken in ready:
            os.read(woken, 1 << 10)
        for member in members:
            if not member.left:
                member.hear(ready)
        if deadline is None:
            if any(m.failed for m in members):
                deadline = time.monotonic() + GRACE
            elif all(m.word is not None for m in members):
                deadline = time.monotonic() + LEAVING
        elif time.monotonic() >= deadline:
            return  # the others are ended


def _not_met(members: Sequence[_Member]) -> bool:
    """Whether ranks failed, and all of them in finding the others: a busy machine, as a rule."""
    failed = [m for m in members if m.failed]
    return bool(failed) and all(m.not_met for m in failed)


def _outcome(members: Sequence[_Member]) -> Any:
    """The result of rank 0, or the error that came first and does not follow from another's."""
    own = [m for m in members if m.failed and not m.lost_contact]
    if own:
        raise min(own, key=lambda m: m.failed_at or 0.0).error()
    lost = [m for m in members if m.lost_contact]
    silent = [f"rank {m.index}" for m in members if m.word is None]
    if lost and silent:
        waited, said = lost[0], lost[0].word or {}
        message = f"{' and '.join(silent)}: no answer to rank {waited.index}, which has given up"
        raise RankError(f"{message} ({said['text']})", said["trace"])
    for member in [m for m in members if m.preempted] or lost:
        raise member.error()
    return members[0].word["result"]  # type: ignore[index]
