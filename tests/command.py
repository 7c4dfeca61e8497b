"""The command in a process of its own, which a test may kill when it is far enough."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import TINY
from tests.launch_helpers import wait_until

CHECKOUT = Path(__file__).resolve().parents[1]
OWN = (
    "data.clips_per_epoch=37",
    "trainer.accumulate=3",
    "trainer.log_every=1",
    "checkpoint.every=3",
    "task.score_clips=2",
    "task.samples=1",
    "task.untrained=false",
)
PATIENT_RAY = {  # with a machine that is slow and busy
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
}
SMALL = (*(o for o in TINY if not o.startswith(("steps=", "data.clips_per_epoch="))), *OWN)


def begin(out: Path, *overrides: str) -> subprocess.Popen:
    """Starts `python run.py`, its words in `out`/said.txt; in a process group of its own."""
    given = {o.partition("=")[0] for o in overrides}
    own = (o for o in SMALL if o.partition("=")[0] not in given)
    words = [*own, f"out={out}", f"cache={out}/cache", *overrides]
    out.mkdir(exist_ok=True)
    with (out / "said.txt").open("a") as said:
        return subprocess.Popen(
            [sys.executable, "run.py", *words], cwd=CHECKOUT, stdout=said, stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip


def reached(out: Path) -> int:
    """The last step in the metrics file, also before a rewind; 0 without one."""
    text = "".join(p.read_text() for p in out.glob("*/metrics.jsonl"))
    whole = text.splitlines()[:-1] if text and not text.endswith("\n") else text.splitlines()
    return max((json.loads(line).get("step", 0) for line in whole), default=0)


def run_until(out: Path, step: int | None, number: signal.Signals, *overrides: str) -> int:
    """Runs the command, sends a signal after `step` (None: never), and returns its exit code.

    Its ranks are gone then, too: after a kill they end by themselves, a moment later.
    """
    process = begin(out, *overrides)
    try:
        while step is not None and process.poll() is None:
            if reached(out) >= step:
                os.killpg(process.pid, number)
                break
            time.sleep(0.005)
        return process.wait(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for lock in out.glob("*/lock"):
            wait_until(lambda lock=lock: is_free(lock))


def is_free(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def said(out: Path) -> str:
    return (out / "said.txt").read_text()


def folder_of(out: Path) -> Path:
    (path,) = out.glob("*/config.yaml")
    return path.parent
