"""The supervisor: starts the ranks of a run, reports how they end, and always cleans up.

The process that calls `launch` never trains and does not import torch. Ranks are forked from a
server that has made the heavy imports once, so later jobs of the same process start quickly. They
get plain settings and all environment variables, and rendezvous through a file instead of a port.
The first rank that fails is named with its own error. No rank outlives the supervisor, even if
that is killed.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

from sandbox.config.root import Root, to_container
from sandbox.contracts import ConfigError
from sandbox.distributed import signals
from sandbox.distributed.rank import Rank, check_plain
from sandbox.distributed.rank_handle import RankHandle
from sandbox.distributed.rank_process import (
    RankSpec,
    error_report,
    external_rank,
    run_external,
    run_target,
)
from sandbox.distributed.remote_errors import ADVICE, RankLost, RemoteTraceback, shortened
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
    "sandbox.training.setup",
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
POLL_SECONDS = 0.1  # between two checks for signals and reports
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
    imports = [name for _, cfg in root.parts() for name in (*cfg.imports, cfg.plugin)]
    return launch(
        target,
        {"root": to_container(root), "overrides": [*overrides], "group": group},
        trainer.processes,
        device=trainer.accelerator,
        timeout=trainer.timeout,
        preload=[*dict.fromkeys((*PRELOAD, *imports))],
        in_process=_in_process.get(),
    )


def launch(
    target: str,
    settings: Any,
    processes: int = 1,
    *,
    device: str = "cpu",
    timeout: float = 600.0,
    preload: Sequence[str] = PRELOAD,
    in_process: bool = False,
) -> Any:
    """Calls `target`, "module:function", as function(settings, rank) in each rank.

    `settings` and the result, that of rank 0, are plain containers. `device`: "cpu", "cuda", where
    rank r has the r-th GPU, or "auto"; `timeout`: seconds that a rank waits for the others;
    `preload`: modules and plugins that the first call imports once for all ranks of this process.
    The only rank is this process with `in_process`, and where torchrun or srun started it.

    Raises a rank's SandboxError unchanged (Preempted after a stop request), RankLost for ranks that
    were killed or give no answer, RankError for other errors, and KeyboardInterrupt at the third
    signal. The cause of an error is a RemoteTraceback.
    """
    check_plain(settings, "settings")
    external = external_rank(os.environ)
    if external is not None:
        rank, method = external
        if processes != rank.world:
            raise ConfigError(
                f"trainer.processes={processes}: this is rank {rank.index} of {rank.world} that "
                f"torchrun or srun started; want {rank.world}"
            )
        try:
            return run_external(RankSpec(target, settings, device, timeout, method), rank)
        except Exception as e:
            report = error_report(e, rank.index)
            if not report["lost_contact"]:
                raise
            raise report["error"] from e
    if in_process and processes == 1:
        return run_target(RankSpec(target, settings, device, timeout), Rank())
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environ |= {COMMAND: str(os.getpid())}
    if sys.platform == "linux":
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    spec = RankSpec(target, settings, device, timeout, environment=environ)
    return _run_ranks(spec, processes, preload)


def _run_ranks(spec: RankSpec, processes: int, preload: Sequence[str]) -> Any:
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # TMPDIR may be a network disk
    for left in reversed(range(CONNECT_ATTEMPTS)):
        ranks: list[RankHandle] = []
        with (
            tempfile.TemporaryDirectory(
                prefix="sandbox-ranks-", dir=parent, ignore_cleanup_errors=True
            ) as folder,
            _stop_requests(ranks) as received,
        ):
            own = replace(spec, init_method=f"file://{folder}/store", folder=folder)
            try:
                for i in range(processes):
                    rank = Rank(i, processes, i, processes, supervised=True)
                    ranks.append(RankHandle(own, rank, preload))
                    if received:
                        ranks[-1].request_stop(received[0])
                _wait(ranks, spec.timeout)
            finally:
                for handle in ranks:
                    handle.end()
        unconnected = [rank.get("not_connected") for rank in ranks if rank.failed]
        if not left or received or not unconnected or not all(unconnected):
            return _outcome(ranks)
        # as a rule on a busy machine
        sys.stderr.write(f"the processes did not connect; starting them again ({left} more)\n")


@contextmanager
def _stop_requests(ranks: list[RankHandle]) -> Iterator[list[int]]:
    """Inside the block signals request the ranks to stop; the third raises KeyboardInterrupt.

    Yields the signals received so far.
    """
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 3:
            raise KeyboardInterrupt
        if len(received) == 1:
            signals.write_stderr(
                "Stopping after this step. Press Ctrl-C twice more to exit immediately."
            )
        for rank in ranks:
            rank.request_stop(received[0])

    previous = signals.current_handlers()
    signals.set_handlers(dict.fromkeys(previous, on_signal))
    try:
        yield received
    finally:
        signals.set_handlers(previous)


def _wait(ranks: Sequence[RankHandle], timeout: float) -> None:
    """Waits until every rank has exited, or for a grace period after a failure.

    It polls, since a signal that arrives in another thread does not interrupt `wait`. Raises
    RankLost where others wait for a rank that is stopped for longer than `timeout` seconds.
    """
    deadline: float | None = None
    most_stopped = (timeout + EXIT_GRACE) / POLL_SECONDS  # a collective gives up before
    while running := [rank for rank in ranks if not rank.exited]:
        wait([rank.process.sentinel for rank in running], POLL_SECONDS)
        for rank in running:
            rank.update()
            if len(ranks) > 1 and rank.stopped_polls > most_stopped:
                raise RankLost(
                    f"rank {rank.index}: stopped for more than {timeout:g} s (SIGSTOP); {ADVICE}"
                )
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
        error = RankLost(
            f"{silent}: no answer to rank {lost[0].index}, which has given up "
            f"({shortened(lost[0].get('text'))}); {ADVICE}"
        )
        raise error from RemoteTraceback(lost[0].get("trace"))
    for rank in [rank for rank in ranks if rank.preempted] or lost:
        raise rank.error()
    return ranks[0].get("result")
