"""Progress lines: rewritten on a terminal, now and then in a file."""

from __future__ import annotations

import io

from sandbox.reports.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_the_last_line_and_not_every_step():
    out = io.StringIO()
    with Progress("training", 1000, stream=out) as progress:
        for step in range(1, 1001):
            progress.update(step, loss=f"{step}")
    lines = out.getvalue().splitlines()
    assert len(lines) < 5  # one each five seconds, and the last
    assert lines[-1].startswith("training 1000/1000  loss 1000  0:0")


def test_a_terminal_line_is_rewritten_and_ends_at_last():
    out = Terminal()
    with Progress("training", 3, stream=out) as progress:
        progress.every = 0
        for step in (1, 2, 3):
            progress.update(step)
    text = out.getvalue()
    assert text.count("\r") == 3 and text.count("\n") == 1 and text.endswith("\n")
    assert "steps/s" in text and "left" in text


def test_a_shorter_line_covers_a_longer_one():
    out = Terminal()
    with Progress("training", 3, stream=out) as progress:
        progress.every = 0
        progress.update(1, note="a long remark that must go")
        progress.update(2)
    first, second = out.getvalue().rstrip("\n").split("\r")[1:]
    assert len(second) >= len(first.rstrip())


def test_speed_of_a_resumed_count_is_that_of_its_own_steps():
    out = io.StringIO()
    progress = Progress("training", 2000, first=1000, stream=out)
    progress.every, progress.start = 0, progress.start - 10
    progress.update(1010)
    assert "  1.0 steps/s  16:" in out.getvalue()


def test_nothing_is_said_after_the_end():
    out = io.StringIO()
    with Progress("sampling", 2, stream=out) as progress:
        progress.update(2)
        progress.update(2)
        progress.update(3)
    assert len(out.getvalue().splitlines()) == 1


def test_hours_are_written():
    out = io.StringIO()
    progress = Progress("training", 7201, stream=out)
    progress.every, progress.start = 0, progress.start - 1
    progress.update(1)
    assert "2:00:0" in out.getvalue()
