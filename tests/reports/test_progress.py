"""Progress: a live line in a terminal, a line now and then in a log."""

from __future__ import annotations

import io

from sandbox.reports.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_the_last_line_and_not_every_step():
    out = io.StringIO()
    with Progress("training", 1000, stream=out) as progress:
        for step in range(1, 1001):
            progress.update(step, loss=f"{step}")
    lines = out.getvalue().splitlines()
    assert len(lines) < 5  # one each five seconds, and the last
    assert lines[-1].startswith("training 1000/1000  loss 1000 0:0")


def test_a_terminal_line_is_rewritten_and_ends_with_a_newline():
    out = Terminal()
    with Progress("training", 3, stream=out) as progress:
        progress.every = 0
        for step in (1, 2, 3):
            progress.update(step)
    text = out.getvalue()
    assert text.count("\n") == 1
    assert all(f"training {step}/3" in text for step in (1, 2, 3))
    assert "steps/s" in text and "left" in text


def test_the_speed_of_a_resumed_count_excludes_earlier_steps():
    now = 0.0
    out = io.StringIO()
    progress = Progress("training", 2000, first=1000, stream=out)
    progress.every, progress.bar.get_time = 0, lambda: now
    for step in range(1001, 1012):
        now += 1.0
        progress.update(step)
    assert "1.0 steps/s, left: 0:16:" in out.getvalue()


def test_updates_after_the_end_print_nothing():
    out = io.StringIO()
    with Progress("sampling", 2, stream=out) as progress:
        progress.update(2)
        progress.update(2)
        progress.update(3)
    assert len(out.getvalue().splitlines()) == 1


def test_work_without_steps_prints_nothing():
    out = io.StringIO()
    with Progress("sampling", 0, stream=out):
        pass
    assert out.getvalue() == ""
