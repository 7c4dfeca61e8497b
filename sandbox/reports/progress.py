"""Progress of long work, through rich: a live line in a terminal, a line every 5 s in a log."""

import sys
import time
from typing import Self, TextIO


class Progress:
    """`with Progress("training", 1200) as p: p.update(step, loss="0.47")`.

    Shows done/total, speed and time left; `first` is the count that a resumed run starts from.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "step",
        first: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        from rich import console, progress

        output: TextIO = stream or sys.stdout
        self.total, self.unit, self.every = total, unit, 0.1 if output.isatty() else 5.0
        self.shown = time.monotonic()
        width = None if output.isatty() else 200
        self.console = console.Console(
            file=output, width=width, force_jupyter=False, highlight=False
        )
        line = "{task.description} {task.completed}/{task.total}{task.fields[facts]}"
        self.bar = progress.Progress(
            progress.TextColumn(line, markup=False),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console, auto_refresh=False,
        )  # fmt: skip
        self.bar.add_task(what, total=total, completed=first, facts="")
        (self.task,) = self.bar.tasks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar.live.is_started:
            self.bar.stop()

    def update(self, done: int, **facts: str) -> None:
        is_last = done >= self.total
        self.bar.update(self.task.id, completed=min(done, self.total))
        now = time.monotonic()
        if now - self.shown < self.every and not is_last:
            return
        self.shown = now
        shown = [f"  {k} {v}" for k, v in facts.items()]
        if self.task.speed and not is_last:
            shown.append(f"  {self.task.speed:.1f} {self.unit}s/s, left:")
        self.task.fields["facts"] = "".join(shown)
        self.bar.start()
        if self.console.is_terminal:
            self.bar.refresh()
        elif not is_last:  # which stop() prints
            self.console.print(self.bar.get_renderable())
