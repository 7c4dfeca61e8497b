"""Progress of long work: one line of a terminal that is rewritten, or now and then one of a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """`with Progress("training", 1200) as p: p.update(step, loss="0.47")`.

    Shows what, done/total, speed and time left; `first` is where a resumed count starts.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "step",
        first: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.first = what, total, unit, first
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.every = 0.1 if self.live else 5.0
        self.start = self.shown = time.monotonic()
        self.width = 0
        self.ended = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.live and self.width:
            self.stream.write("\n")
        self.stream.flush()

    def update(self, done: int, **facts: str) -> None:
        now = time.monotonic()
        if self.ended or (now - self.shown < self.every and done < self.total):
            return
        self.ended = done >= self.total
        self.shown = now
        seconds = max(now - self.start, 1e-9)
        speed = (done - self.first) / seconds
        left = (self.total - done) / speed if speed else 0.0
        said = [f"{self.what} {done}/{self.total}", *(f"{k} {v}" for k, v in facts.items())]
        if done < self.total:
            said += [f"{speed:.1f} {self.unit}s/s", f"{_clock(left)} left"]
        else:
            said.append(f"{_clock(seconds)}")
        line = "  ".join(said)
        if self.live:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
