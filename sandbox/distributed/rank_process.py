"""What runs in the process of a rank: setup, the target function, and the report of its end."""

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
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from sandbox.config.plugin_faults import plugin_fault
from sandbox.config.secrets import Masked
from sandbox.contracts import ConfigError, SandboxError
from sandbox.distributed.rank import FirstRankFailed, Rank, check_plain
from sandbox.distributed.remote_errors import is_picklable
from sandbox.distributed.signals import SIGNALS

LOST_CONTACT = (  # in errors of gloo, NCCL and their store when another rank does not answer
    "/gloo/",
    "Gloo",
    "NCCL",
    "TCPStore",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timeout waiting for key",
    "Application timeout caused pair closure",
)


class RendezvousError(RuntimeError):
    """The ranks could not connect; none has started its work."""


@dataclass(frozen=True)
class RankSpec:
    """What a rank runs, and its place among the ranks.

    device: "cpu", "cuda" or "auto"; timeout: seconds that a rank waits for the others; threads:
    torch threads, None leaves them; init_method: of torch.distributed, "srun" takes it from SLURM;
    folder: of the rendezvous, removed when the supervisor has died; environment: all variables.
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
    init_method: str = ""
    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The environment variables in which Lightning and others look for the rank's place."""
        return {
            "RANK": str(self.index),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "NODE_RANK": str(self.node),
        }

    def rank(self, supervised: bool = False) -> Rank:
        return Rank(self.index, self.world, self.local, self.local_world, supervised)


def external_rank(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Fields of a `RankSpec` for a rank that torchrun or srun started, else None.

    Leftover variables alone (LOCAL_RANK, WORLD_SIZE) do not count; nor does a SLURM step of one
    task (submitit).
    """
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        return {
            "index": int(environ["RANK"]),
            "world": int(environ["WORLD_SIZE"]),
            "local": int(environ["LOCAL_RANK"]),
            "local_world": int(environ["LOCAL_WORLD_SIZE"]),
            "node": int(environ.get("GROUP_RANK", 0)),
            "init_method": "env://",
        }
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks > 1:
        return {
            "index": int(environ["SLURM_PROCID"]),
            "world": tasks,
            "local": int(environ["SLURM_LOCALID"]),
            "local_world": tasks // int(environ.get("SLURM_STEP_NUM_NODES", 1)),
            "node": int(environ.get("SLURM_NODEID", 0)),
            "init_method": "srun",
        }
    return None


def run_target(spec: RankSpec, rank: Rank) -> Any:
    """Calls the target, connected with the other ranks; returns its result, which is plain."""
    if spec.threads is not None:
        import torch

        torch.set_num_threads(spec.threads)
    module, _, function = spec.target.partition(":")
    call = getattr(importlib.import_module(module), function)
    with connected(spec), rank.handling_signals():
        return check_plain(call(spec.settings, rank), "the result")


@contextmanager
def connected(spec: RankSpec) -> Iterator[None]:
    """The process group exists inside the block; Lightning finds and uses it."""
    is_cuda = _has_cuda(spec)
    if is_cuda:
        import torch

        torch.cuda.set_device(spec.local)
    if spec.world == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            init_method=_init_method(spec.init_method),
            rank=spec.index,
            world_size=spec.world,
            timeout=timedelta(seconds=spec.timeout),
        )
        dist.all_reduce(torch.zeros(()))  # a barrier: all ranks are connected
    except RuntimeError as e:
        if not _lost_contact(e):
            raise
        raise RendezvousError(str(e)) from e
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this


def _has_cuda(spec: RankSpec) -> bool:
    """Whether this rank has a GPU of its own. Raises ConfigError where there are too few."""
    if spec.device not in ("cuda", "auto"):
        return False
    import torch

    count = torch.cuda.device_count()
    if count and spec.local_world > count:
        raise ConfigError(
            f"trainer.processes={spec.world}: this machine has {count} CUDA device(s) for "
            f"{spec.local_world} of them; want at most one process a device, or "
            "trainer.accelerator=cpu"
        )
    return count > 0


def _init_method(method: str) -> str:
    if method != "srun":
        return method
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    port = 15000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    return f"tcp://{SLURMEnvironment.resolve_root_node_address(nodes)}:{port}"


def run_external(spec: RankSpec) -> Any:
    """Runs the target in a rank that torchrun or srun started. Errors propagate unchanged."""
    os.environ.update(spec.variables())
    if spec.index > 0:  # only rank 0 writes to stdout
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    return run_target(spec, spec.rank())


# --- under a supervisor ---------------------------------------------------------------------------


def run_supervised(
    spec: RankSpec, reports: Connection, requests: Connection, streams: list[Connection]
) -> None:
    """The main function of a rank that the supervisor started.

    The rank is in a session of its own, so that neither it nor its data workers get signals of a
    terminal or scheduler: the supervisor requests a stop by a byte in the pipe `requests`.
    """
    os.setsid()
    rank = spec.rank(supervised=True)
    with rank.handling_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ.clear()
        os.environ.update(spec.environment | spec.variables())
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
            stream.close()
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)  # type: ignore[assignment]
        faulthandler.enable()
        # For data workers; a forked rank would use "forkserver".
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        args = (requests, rank, spec.folder)
        threading.Thread(target=_follow_requests, args=args, daemon=True).start()
        try:
            reports.send_bytes(pickle.dumps({"result": run_target(spec, rank)}))
        except BaseException as e:  # the supervisor reports every error
            reports.send_bytes(pickle.dumps(error_report(e)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # without a wait for other ranks or threads


def _follow_requests(requests: Connection, rank: Rank, folder: str) -> None:
    """Reads stop requests; when the supervisor has died, kills the processes of the rank."""
    while number := os.read(requests.fileno(), 1):
        rank.request_stop(number[0])
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def error_report(error: BaseException) -> dict[str, Any]:
    """An error as plain data, with the pickled error if it is a SandboxError."""
    lost = not isinstance(error, SandboxError) and _lost_contact(error)
    error = error if lost else plugin_fault(error) or error
    is_ours, text = isinstance(error, SandboxError), str(error)
    if lost:
        text = re.sub(r"^\[\S+\] ", "", text)  # the line number in gloo's sources
    elif not is_ours:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return {
        "error": pickle.dumps(error) if is_ours and is_picklable(error) else None,
        "module": type(error).__module__,
        "code": error.exit_code if isinstance(error, SandboxError) else None,
        "text": text,
        "lost_contact": lost,
        "not_connected": isinstance(error, RendezvousError),
        "trace": "".join(traceback.format_exception(error)),
    }


def _lost_contact(error: BaseException | None) -> bool:
    """Whether the failure of another rank caused an error, through any of its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kinds = {c.__name__ for c in type(error).__mro__}
        matches = isinstance(error, RuntimeError) and any(t in str(error) for t in LOST_CONTACT)
        if matches or {"DistError", FirstRankFailed.__name__, RendezvousError.__name__} & kinds:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
