"""Supervisors in processes of their own, and what became of their ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path[:0] = {path!r}
from sandbox.contracts import SandboxError
from sandbox.launch import launch

try:
    print(launch({target!r}, {settings!r}, 2, preload={preload!r}, timeout=60))
except SandboxError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def script(function: str, log: Path, preload: Sequence[str] = ("torch",)) -> Path:
    """A script that launches 2 ranks, unguarded by __name__."""
    text = SCRIPT.format(
        path=[str(HERE), str(HERE.parent), str(log.parent)],
        target=f"launch_targets:{function}",
        settings={"log": str(log)},
        preload=[*preload],
    )
    path = log.with_name("script.py")
    path.write_text(text)
    return path


@contextmanager
def supervisor(
    function: str, log: Path, preload: Sequence[str] = ("torch",)
) -> Iterator[subprocess.Popen[str]]:
    """That script as the leader of a process group of its own; killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, str(script(function, log, preload))],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_until(true: Callable[[], bool]) -> None:
    """For as long as only a hang takes, on a machine that is slow and busy, too."""
    for _ in range(15000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to pass within five minutes")


def lines(log: Path, text: str) -> list[str]:
    """Lines of the log that have `text`, without the process in front."""
    said = log.read_text().splitlines() if log.exists() else []
    return [x.partition(" ")[2] for x in said if text in x]


def alive(log: Path) -> set[int]:
    """Processes of the log, and of their sessions, that still run."""
    ranks = {int(x.split()[0]) for x in log.read_text().splitlines()}
    assert all(pid > 1 for pid in ranks), ranks  # 0 is the session of the system's own processes
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it has just ended
        pid = int(entry.parent.name)
        if state != "Z" and (pid in ranks or int(session) in ranks):
            found.add(pid)
    return found
