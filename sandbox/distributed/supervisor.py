"""The supervisor: starts the ranks of a run, reports how they end, and always cleans up.

The process that calls `launch` never trains and does not import torch. Ranks are forked from a
server that has made the heavy imports once, so later jobs of the same process start quickly. They
get plain settings and all environment variables, and rendezvous through a file instead of a port.
The first rank that fails is named with its own error. No rank outlives the supervisor, even if
that is killed.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing.connection import wait
from typing import Any, Self

from sandbox.config.root import Root, to_container
from sandbox.contracts import ConfigError
from sandbox.distributed import signals
from sandbox.distributed.rank import Rank, check_plain
from sandbox.distributed.rank_handle import ADVICE, RankHandle, RankLost, lost_contact, shortened
from sandbox.distributed.rank_process import (
    RankSpec,
    error_report,
    external_rank,
    run_external,
    run_target,
)
from sandbox.storage.locks import COMMAND

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
LAUNCHER_VARIABLES = (  # left over from another launcher
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
CONNECT_ATTEMPTS = 3
FAILURE_GRACE = 3.0  # seconds for the other ranks after one has failed
EXIT_GRACE = 10.0  # seconds for all ranks after their reports

_in_process: ContextVar[bool] = ContextVar("in_process", default=False)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Inside the block a run with one process is this process, as notebooks need it."""
    token = _in_process.set(True)
    try:
        yield
    finally:
        _in_process.reset(token)


def launch_run(target: str, root: Root, overrides: Sequence[str], group: str | None) -> Any:
    """`launch` with the processes of a configuration.

    `target` gets the settings "root" (the full configuration), "overrides" as typed, and "group",
    the name of a multirun or None.
    """

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

    `settings` and the result, that of rank 0, are plain containers. `device`: "cpu", "cuda", where
    rank r has the r-th GPU, or "auto"; `timeout`: seconds that a rank waits for the others;
    `threads`: torch threads of a rank, by default a fair share of the cores; `environment`: extra
    variables; `preload`: modules and plugins that the first call imports once for all ranks of this
    process. The only rank is this process with `in_process`, and where torchrun or srun started it.

    Raises a rank's SandboxError unchanged (Preempted after a stop request), RankLost for ranks that
    were killed or give no answer, RankError for other errors, and KeyboardInterrupt at the third
    signal. The cause of an error is a RemoteTraceback.
    """
    check_plain(settings, "settings")
    shared: dict[str, Any] = {"device": device, "timeout": timeout, "threads": threads}
    place = external_rank(os.environ)
    if place is not None:
        if processes != place["world"]:
            raise ConfigError(
                f"trainer.processes={processes}: this is rank {place['index']} of "
                f"{place['world']} that torchrun or srun started; want {place['world']}"
            )
        try:
            return run_external(RankSpec(target, settings, **place, **shared))
        except Exception as e:
            if not (report := error_report(e))["lost_contact"]:
                raise
            raise lost_contact(place["index"], report["text"]) from e
    if in_process:
        if processes != 1:
            raise ConfigError(f"trainer.processes={processes}: want 1 in process")
        return run_target(RankSpec(target, settings, **shared), Rank())
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environ |= {COMMAND: str(os.getpid()), **(environment or {})}
    if sys.platform == "linux":
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    shared |= {"threads": threads or _threads(environ, processes), "environment": environ}
    return _run_ranks(target, settings, processes, shared, preload)


def _run_ranks(
    target: str, settings: Any, processes: int, shared: dict[str, Any], preload: Sequence[str]
) -> Any:
    for left in reversed(range(CONNECT_ATTEMPTS)):
        ranks: list[RankHandle] = []
        with _rendezvous_folder() as folder, _StopRequests(ranks) as stop:
            shared |= {"init_method": f"file://{folder}/store", "folder": folder}
            try:
                for i in range(processes):
                    spec = RankSpec(target, settings, i, processes, i, processes, **shared)
                    ranks.append(RankHandle(spec, preload))
                    stop.forward()
                _wait(ranks, stop.fd)
            finally:
                for rank in ranks:
                    rank.end()
        failed = [rank for rank in ranks if rank.failed]
        # as a rule on a busy machine
        none_connected = failed and all(rank.get("not_connected") for rank in failed)
        if not left or stop.received or not none_connected:
            return _outcome(ranks)
        sys.stderr.write(f"the processes did not connect; starting them again ({left} more)\n")


def _threads(environ: Mapping[str, str], processes: int) -> int:
    """Torch threads of a rank; a forked rank has read OMP_NUM_THREADS too early."""
    if environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(environ["OMP_NUM_THREADS"]))
    from sandbox.distributed.pool import cores

    return max(1, cores() // processes)


@contextmanager
def _rendezvous_folder() -> Iterator[str]:
    """An empty folder for the rendezvous, in memory if possible: TMPDIR may be a network disk."""
    memory = "/dev/shm"
    parent = memory if os.access(memory, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="sandbox-ranks-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _StopRequests:
    """Inside the block signals request the ranks to stop; the third raises KeyboardInterrupt.

    `fd` becomes readable at a signal. Otherwise a signal that arrives just before `wait`, or in
    another thread, would be handled only when the wait ends, which may be never.
    """

    def __init__(self, ranks: list[RankHandle]) -> None:
        self.ranks = ranks
        self.received: list[int] = []

    def __enter__(self) -> Self:
        self.fd, self._wakeup = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._wakeup, False)
        self.previous = signals.current_handlers()
        self.previous_fd = signals.set_wakeup_fd(self._wakeup)
        signals.set_handlers(dict.fromkeys(self.previous, self._on_signal))
        return self

    def __exit__(self, *_: object) -> None:
        signals.set_handlers(self.previous)
        signals.set_wakeup_fd(self.previous_fd)
        os.close(self.fd)
        os.close(self._wakeup)

    def _on_signal(self, number: int, frame: object) -> None:
        self.received.append(number)
        if len(self.received) == 3:
            raise KeyboardInterrupt
        if len(self.received) == 1:
            signals.write_stderr(
                "Stopping after this step. Press Ctrl-C twice more to exit immediately."
            )
        self.forward()

    def forward(self) -> None:
        """Forwards the first signal, if there is one, to the ranks that have started."""
        for rank in self.ranks if self.received else ():
            rank.request_stop(self.received[0])


def _wait(ranks: Sequence[RankHandle], fd: int) -> None:
    """Waits until every rank has exited, or for a grace period after a failure."""
    deadline: float | None = None
    while any(not rank.exited for rank in ranks):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([fd, *(s for rank in ranks for s in rank.sources())], timeout)
        if fd in ready:
            os.read(fd, 1 << 10)
        for rank in ranks:
            if not rank.exited:
                rank.receive(ready)
        if deadline is None:
            if any(rank.failed for rank in ranks):
                deadline = time.monotonic() + FAILURE_GRACE
            elif all(rank.report is not None for rank in ranks):
                deadline = time.monotonic() + EXIT_GRACE
        elif time.monotonic() >= deadline:
            return


def _outcome(ranks: Sequence[RankHandle]) -> Any:
    """The result of rank 0. Raises the first error that is not a consequence of another's."""
    lost = [rank for rank in ranks if rank.get("lost_contact")]
    if own := [rank for rank in ranks if rank.failed and rank not in lost]:
        raise min(own, key=lambda rank: rank.failed_at or 0.0).error()
    silent = " and ".join(f"rank {rank.index}" for rank in ranks if rank.report is None)
    if lost and silent:
        raise RankLost(
            f"{silent}: no answer to rank {lost[0].index}, which has given up "
            f"({shortened(lost[0].get('text'))}); {ADVICE}",
            lost[0].get("trace"),
        )
    for rank in [rank for rank in ranks if rank.preempted] or lost:
        raise rank.error()
    return ranks[0].get("result")
