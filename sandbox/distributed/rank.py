"""What runs inside a rank: how it hears that it shall stop, how ranks meet, and their last words.

A rank is one of the processes of a run. The supervisor, torchrun or srun start ranks; in a
notebook or test the current process is the rank. A function that runs in a rank is called with
plain settings and its `Rank`. Importing this module imports no torch.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Self

from sandbox.contracts import ConfigError, Preempted
from sandbox.distributed.remote_errors import survives

if TYPE_CHECKING:
    from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # all ask to stop
LOST_CONTACT = (  # what gloo, NCCL and their store say when another rank is gone or does not answer
    "/gloo/",
    "Gloo",
    "NCCL",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timeout waiting for key",
    "Application timeout caused pair closure",
)
PATIENCE = 0.02  # seconds between two looks of a rank that waits for its turn


class FirstFailed(RuntimeError):
    """Rank 0 failed in what it was to do before the others; its own error says why."""


class NotMet(RuntimeError):
    """The processes could not connect with one another; none has begun its work."""


# --- one of the processes of a run ----------------------------------------------------------------


class Rank:
    """Process number `index` of `world`, and number `local` of the `local_world` on its machine.

    A signal only sets a flag, which training looks at after an optimizer step: what is saved is
    whole. Where no supervisor is in between, the same signal again does what it did before: Ctrl-C
    raises KeyboardInterrupt. Signals reach only the main thread; in another one nobody asks.
    """

    def __init__(
        self,
        index: int = 0,
        world: int = 1,
        local: int | None = None,
        local_world: int | None = None,
        supervised: bool = False,
    ) -> None:
        self.index, self.world = index, world
        self.local = index if local is None else local
        self.local_world = world if local_world is None else local_world
        self.supervised = supervised
        self._signal = [0]  # the one that asked; shared with `alone`
        self._turns = 0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def _number(self) -> int:
        return self._signal[0]

    @property
    def asked(self) -> str | None:
        """The name of the signal that asked this rank to stop."""
        return signal.Signals(self._number).name if self._number else None

    def stop_requested(self) -> bool:
        """Whether this rank has been asked; another one may not know of it yet."""
        return self._number > 0

    def agree_to_stop(self) -> str | None:
        """The name of a signal that asked any rank to stop, or None; the same on all ranks.

        All ranks call it, after the same step.
        """
        if self.world > 1:
            agreed = self._greatest(self._number)
            if not agreed:  # a signal that came meanwhile counts at the next step
                return None
            self.ask(agreed)
        return self.asked

    def barrier(self) -> None:
        """No rank leaves before all are here."""
        if self.world > 1:
            self._greatest(0)

    def broadcast_plain(self, value: Any) -> Any:
        """The value of rank 0 (plain containers), on all ranks."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        held = [plain(value, "value") if self.index == 0 else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def gather_plain(self, value: Any) -> list[Any]:
        """The values of all ranks (plain containers), in their order, on all ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        held: list[Any] = [None] * self.world
        dist.all_gather_object(held, plain(value, "value"))
        return held

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, the same on each; `tensor` itself where there is one."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.clone()
        dist.all_reduce(total)
        return total / self.world

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others do, who wait as long as that takes.

        They raise FirstFailed where rank 0 leaves it with an error.
        """
        if self.world == 1:
            yield
            return
        from torch.distributed import distributed_c10d

        self._turns += 1
        store, turn = distributed_c10d._get_default_store(), f"sandbox/turn/{self._turns}"
        if self.index > 0:
            while not store.check([turn]):  # a collective would end by its timeout
                time.sleep(PATIENCE)
            if store.get(turn) != b"done":
                raise FirstFailed("rank 0 has failed before it was this rank's turn")
            yield
            return
        try:
            yield
        except BaseException:
            store.set(turn, "failed")
            raise
        store.set(turn, "done")

    def meet(self) -> None:
        """No rank leaves before all are here, however long that takes. Raises Preempted."""
        if self.world == 1:
            return
        from torch.distributed import distributed_c10d

        self._turns += 1
        store, here = distributed_c10d._get_default_store(), f"sandbox/here/{self._turns}"
        store.add(here, 1)
        while store.add(here, 0) < self.world:  # a collective would end by its timeout
            if self.stop_requested():
                raise Preempted(f"stopped by {self.asked} while waiting for the other processes")
            time.sleep(PATIENCE)

    def alone(self) -> Self:
        """This rank as the only one, for what others wait for; it hears what this one hears."""
        one = copy(self)
        one.index = one.local = 0
        one.world = one.local_world = 1
        return one

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block a signal asks to stop, and does nothing else."""
        if self._before:  # already so, further out
            self.listen()
            yield
            return
        self._before = handlers()
        self.listen()
        try:
            yield
        finally:
            handle(self._before)
            self._before = {}

    def listen(self) -> None:
        """The same again, where a library has put handlers of its own in place."""
        handle(dict.fromkeys(self._before, self._note))

    def ask(self, number: int) -> None:
        """Asks this rank to stop because of a signal."""
        self._signal[0] = number

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a child, forked with this handler
            if number != signal.SIGINT:  # which a terminal sends to all: the rank sees to it
                os._exit(128 + number)
            return
        self.ask(number)
        if not self.supervised:
            handle({number: self._before[number]})
            say("stopping after this step; the same again stops at once")

    def _greatest(self, number: int) -> int:
        # On the CPU, where it waits for no kernel.
        import torch
        import torch.distributed as dist

        held = torch.tensor(number)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held)


def handlers() -> dict[int, Any]:
    """What the signals do now, without those that are ignored (nohup) and stay so."""
    present = {number: signal.getsignal(number) for number in SIGNALS}
    return {k: v or signal.SIG_DFL for k, v in present.items() if v is not signal.SIG_IGN}


def handle(wanted: Mapping[int, Any]) -> None:
    """Puts handlers in place, in the main thread, which alone may do so."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in wanted.items():
            signal.signal(number, handler)


def wake(handle: int) -> int:
    """Has each signal write to `handle`, in the main thread; what it wrote to before."""
    if threading.current_thread() is not threading.main_thread():
        return -1
    return signal.set_wakeup_fd(handle, warn_on_full_buffer=False)


def ignore_signals(worker: int) -> None:
    """A data worker's first act (`worker_init_fn`): its rank alone ends it.

    Schedulers send their signal to every process of a job, and a rank without its workers cannot
    finish the step.
    """
    handle(dict.fromkeys(SIGNALS, signal.SIG_IGN))


def say(text: str) -> None:
    """A line on stderr from a signal handler: print cannot be entered again where it met it."""
    os.write(2, f"\n{text}\n".encode())


# --- what it is told ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What one rank does, where and with whom.

    device: "cpu", "cuda" or "auto"; timeout: seconds that a rank waits for the others; threads:
    torch threads, None leaves them; meeting: an init_method of torch.distributed, "srun" asks
    SLURM; folder: of the meeting, removed when the supervisor is gone; environment: the whole.
    """

    target: str
    settings: Any
    index: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    node: int = 0
    device: str = "cpu"
    timeout: float = 600.0
    threads: int | None = None
    meeting: str = ""
    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def names(self) -> dict[str, str]:
        """The names under which Lightning and others look for these numbers."""
        return {
            "RANK": str(self.index),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "NODE_RANK": str(self.node),
        }

    def rank(self, supervised: bool = False) -> Rank:
        return Rank(self.index, self.world, self.local, self.local_world, supervised)


def place(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Which rank this process is where torchrun or srun started it, as fields of `Order`.

    None elsewhere: left-over names alone (LOCAL_RANK, WORLD_SIZE) say nothing, and a job step of
    one task (submitit) is an ordinary process.
    """
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        return {
            "index": int(environ["RANK"]),
            "world": int(environ["WORLD_SIZE"]),
            "local": int(environ["LOCAL_RANK"]),
            "local_world": int(environ["LOCAL_WORLD_SIZE"]),
            "node": int(environ.get("GROUP_RANK", 0)),
            "meeting": "env://",
        }
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks > 1:
        return {
            "index": int(environ["SLURM_PROCID"]),
            "world": tasks,
            "local": int(environ["SLURM_LOCALID"]),
            "local_world": tasks // int(environ.get("SLURM_STEP_NUM_NODES", 1)),
            "node": int(environ.get("SLURM_NODEID", 0)),
            "meeting": "srun",
        }
    return None


def plain(value: Any, name: str) -> Any:
    """`value`, which may hold dicts, lists, tuples, numbers, strings and None. Raises TypeError."""
    if type(value) is dict:
        for key, item in value.items():
            plain(key, f"a key of {name}")
            plain(item, f"{name}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            plain(item, f"{name}.{i}")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{name} is a {type(value).__qualname__}: want plain containers")
    return value


# --- work -----------------------------------------------------------------------------------------


def work(order: Order, rank: Rank) -> Any:
    """Calls the target, connected with the other ranks; its result, which is plain."""
    if order.threads is not None:
        import torch

        torch.set_num_threads(order.threads)
    module, _, function = order.target.partition(":")
    call = getattr(importlib.import_module(module), function)
    with connected(order), rank.listening():
        return plain(call(order.settings, rank), "the result")


@contextmanager
def connected(order: Order) -> Iterator[None]:
    """The process group exists inside the block. Lightning finds and uses it."""
    is_cuda = _has_cuda(order)
    if is_cuda:
        import torch

        torch.cuda.set_device(order.local)
    if order.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            init_method=_meeting(order.meeting),
            rank=order.index,
            world_size=order.world,
            timeout=timedelta(seconds=order.timeout),
        )
        dist.all_reduce(torch.zeros(()))  # which none leaves before all are connected
    except RuntimeError as e:
        if not _lost_contact(e):
            raise
        raise NotMet(str(e)) from e
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this


def _has_cuda(order: Order) -> bool:
    """Whether this rank computes on a GPU of its own. ConfigError where there are too few."""
    if order.device not in ("cuda", "auto"):
        return False
    import torch

    count = torch.cuda.device_count()
    if count and order.local_world > count:
        raise ConfigError(
            f"trainer.processes={order.world}: this machine has {count} CUDA device(s) for "
            f"{order.local_world} of them; want at most one process a device, or "
            "trainer.accelerator=cpu"
        )
    return count > 0


def _meeting(meeting: str) -> str:
    if meeting != "srun":
        return meeting
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    port = 15000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    return f"tcp://{SLURMEnvironment.resolve_root_node_address(nodes)}:{port}"


def serve_outside(order: Order) -> Any:
    """Is the rank that torchrun or srun started. Errors stay as they are."""
    os.environ.update(order.names())
    if order.index > 0:
        _mute()
    return work(order, order.rank())


# --- under a supervisor ---------------------------------------------------------------------------


def serve(order: Order, word: Connection, orders: Connection, streams: list[Connection]) -> None:
    """A rank that the supervisor has started, from its first act to its last word.

    A session of its own keeps away what a terminal or a scheduler sends to a process group, from
    data workers, too: the supervisor alone tells it to stop, by a byte in the pipe `orders`.
    """
    os.setsid()
    rank = order.rank(supervised=True)
    with rank.listening():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ.clear()
        os.environ.update(order.environment | order.names())
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
            stream.close()
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable()
        # For data workers; a forked rank would have "forkserver".
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        threading.Thread(target=_obey, args=(orders, rank, order.folder), daemon=True).start()
        try:
            word.send_bytes(pickle.dumps({"result": work(order, rank)}))
        except BaseException as e:  # whatever it is, the supervisor hears of it
            word.send_bytes(pickle.dumps(last_word(e)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # nothing that waits for other ranks or for threads


def _obey(orders: Connection, rank: Rank, folder: str) -> None:
    """Reads the supervisor's pipe; at its end the supervisor is gone, and nothing may be left."""
    while number := os.read(orders.fileno(), 1):
        rank.ask(number[0])
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _mute() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def last_word(error: BaseException) -> dict[str, Any]:
    """An error as plain facts, with itself where it is one of ours."""
    from sandbox.contracts import SandboxError

    ours, text = isinstance(error, SandboxError), str(error)
    lost = not ours and _lost_contact(error)
    if lost:
        text = re.sub(r"^\[\S+\] ", "", text)  # the line in gloo's sources
    elif not ours:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return {
        "itself": pickle.dumps(error) if ours and survives(error) else None,
        "module": type(error).__module__,
        "code": error.exit_code if isinstance(error, SandboxError) else None,
        "text": text,
        "lost_contact": lost,
        "not_met": isinstance(error, NotMet),
        "trace": "".join(traceback.format_exception(error)),
    }


def _lost_contact(error: BaseException | None) -> bool:
    """Whether another rank's end is behind an error, also where it came up in dealing with one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kinds = {c.__name__ for c in type(error).__mro__}
        said = isinstance(error, RuntimeError) and any(t in str(error) for t in LOST_CONTACT)
        if said or {"DistError", FirstFailed.__name__, NotMet.__name__} & kinds:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
