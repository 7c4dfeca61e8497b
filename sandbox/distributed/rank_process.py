"""What runs in the process of a rank: setup, the target function, and the report of its end."""

import faulthandler
import multiprocessing
import os
import pkgutil
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
from sandbox.distributed.remote_errors import (
    ADVICE,
    RankError,
    RankLost,
    RemoteTraceback,
    shortened,
)
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
    """What all ranks run, and how.

    device: "cpu", "cuda" or "auto"; timeout: seconds that a rank waits for the others; init_method:
    of torch.distributed, "srun" takes it from SLURM; folder: of the rendezvous, removed when the
    supervisor has died; environment: all variables.
    """

    target: str
    settings: Any
    device: str = "cpu"
    timeout: float = 600.0
    init_method: str = ""
    folder: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def external_rank(environ: Mapping[str, str]) -> tuple[Rank, str] | None:
    """The rank that torchrun or srun started, with its `init_method`, else None.

    Leftover variables alone (LOCAL_RANK, WORLD_SIZE) do not count; nor does a SLURM step of one
    task (submitit).
    """
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        index, world, local, local_world, node = (int(environ.get(name, 0)) for name in names)
        return Rank(index, world, local, local_world, node), "env://"
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks > 1:
        index, local, node = (
            int(environ.get(name, 0)) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        )
        local_world = tasks // int(environ.get("SLURM_STEP_NUM_NODES", 1))
        return Rank(index, tasks, local, local_world, node), "srun"
    return None


def run_target(spec: RankSpec, rank: Rank) -> Any:
    """Calls the target, connected with the other ranks; returns its result, which is plain."""
    call = pkgutil.resolve_name(spec.target)
    with connected(spec, rank), rank.handling_signals():
        return check_plain(call(spec.settings, rank), "the result")


@contextmanager
def connected(spec: RankSpec, rank: Rank) -> Iterator[None]:
    """The process group exists inside the block; Lightning finds and uses it.

    On CUDA each rank has its own device. Raises ConfigError where there are too few.
    """
    import torch
    import torch.distributed as dist

    devices = torch.cuda.device_count() if spec.device in ("cuda", "auto") else 0
    if devices and rank.local_world > devices:
        raise ConfigError(
            f"trainer.processes={rank.world}: this machine has {devices} CUDA device(s) for "
            f"{rank.local_world} of them; want at most one process a device, or "
            "trainer.accelerator=cpu"
        )
    if devices:
        torch.cuda.set_device(rank.local)
    if rank.world == 1:
        yield
        return
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if devices else "gloo",
            init_method=_init_method(spec.init_method),
            rank=rank.index,
            world_size=rank.world,
            timeout=timedelta(seconds=spec.timeout),
        )
        dist.all_reduce(torch.zeros(()))  # a barrier: all ranks are connected
    except RuntimeError as e:
        if not _lost_contact(e):
            raise
        raise RendezvousError(str(e)) from e
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this


def _init_method(method: str) -> str:
    if method != "srun":
        return method
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    port = 15000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    return f"tcp://{SLURMEnvironment.resolve_root_node_address(nodes)}:{port}"


def run_external(spec: RankSpec, rank: Rank) -> Any:
    """Runs the target in a rank that torchrun or srun started. Errors propagate unchanged."""
    os.environ.update(rank.variables())
    if rank.index > 0:  # only rank 0 writes to stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return run_target(spec, rank)


# --- under a supervisor ---------------------------------------------------------------------------


def run_supervised(
    spec: RankSpec,
    rank: Rank,
    reports: Connection,
    requests: Connection,
    streams: list[Connection],
) -> None:
    """The main function of a rank that the supervisor started.

    The rank runs in its own session, so that neither it nor its data workers get signals of a
    terminal or scheduler: the supervisor requests a stop by a byte in the pipe `requests`.
    """
    os.setsid()
    with rank.handling_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.environ.clear()
        os.environ.update(spec.environment | rank.variables())
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
            stream.close()
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            # Whole lines, with PYTHONUNBUFFERED, too: those of several ranks do not mix.
            stream.reconfigure(line_buffering=True, write_through=False)
            setattr(sys, name, Masked(stream))
        faulthandler.enable()
        # For data workers; a forked rank would use "forkserver".
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        threading.Thread(
            target=_follow_requests, args=(requests, rank, spec.folder), daemon=True
        ).start()
        try:
            reports.send({"result": run_target(spec, rank)})
        except BaseException as e:  # the supervisor reports every error
            reports.send(error_report(e, rank.index))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # without a wait for other ranks or threads


def _follow_requests(requests: Connection, rank: Rank, folder: str) -> None:
    """Reads stop requests; when the supervisor has died, kills the processes of the rank."""
    while number := os.read(requests.fileno(), 1):
        rank.request_stop(number[0])
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def error_report(error: BaseException, index: int = 0) -> dict[str, Any]:
    """The error of rank `index` as the supervisor raises it, which has not imported its class.

    An error of `sandbox.contracts` stays as it is.
    """
    trace = "".join(traceback.format_exception(error))
    lost = not isinstance(error, SandboxError) and _lost_contact(error)
    error = error if lost else plugin_fault(error) or error
    text = str(error)
    if isinstance(error, SandboxError):
        kind = next(c for c in type(error).__mro__ if c.__module__ == SandboxError.__module__)
        found = error if kind is type(error) else kind(text)
        found.exit_code = error.exit_code  # type: ignore[misc]
    elif lost:
        text = re.sub(r"^\[\S+\] ", "", text)  # the line number in gloo's sources
        found = RankLost(
            f"rank {index}: lost contact with the other ranks ({shortened(text)}); {ADVICE}"
        )
    else:
        name = type(error).__name__
        found = RankError(f"rank {index}: {name}: {text}" if text else f"rank {index}: {name}")
        found.__cause__ = RemoteTraceback(f"rank {index}:\n{trace}")
    return {
        "error": found,
        "text": text,
        "trace": trace,
        "lost_contact": lost,
        "not_connected": isinstance(error, RendezvousError),
    }


def _lost_contact(error: BaseException) -> bool:
    """Whether the failure of another rank caused an error, through any of its causes."""
    kinds = {c.__name__ for c in type(error).__mro__}
    matches = isinstance(error, RuntimeError) and any(t in str(error) for t in LOST_CONTACT)
    if matches or {"DistError", FirstRankFailed.__name__, RendezvousError.__name__} & kinds:
        return True
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and _lost_contact(cause)
