"""metrics.csv: one row per step, in any order of logging."""

import csv
from pathlib import Path

from plugins.logger.csv import CSVLogger


def started(folder: Path) -> CSVLogger:
    logger = CSVLogger(CSVLogger.Config())
    logger.start(folder, {}, "name", None)
    return logger


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_immediately(tmp_path):
    started(tmp_path).metrics(1, {"loss": 0.1 + 0.2})
    assert table(tmp_path) == [{"step": "1", "loss": repr(0.1 + 0.2)}]


def test_a_later_metric_gets_a_column(tmp_path):
    logger = started(tmp_path)
    logger.metrics(1, {"loss": 1.0})
    logger.metrics(2, {"score": 5.0, "loss": 2.0})
    assert table(tmp_path) == [
        {"step": "1", "loss": "1.0", "score": ""},
        {"step": "2", "loss": "2.0", "score": "5.0"},
    ]


def test_metrics_of_one_step_become_one_row(tmp_path):
    logger = started(tmp_path)
    logger.metrics(1, {"loss": 1.0, "score": 2.0})
    logger.metrics(2, {"loss": 3.0, "score": 4.0})
    logger.metrics(1, {"score": 9.0})
    logger.finish(0)
    assert table(tmp_path) == [
        {"step": "1", "loss": "1.0", "score": "9.0"},
        {"step": "2", "loss": "3.0", "score": "4.0"},
    ]


def test_a_resumed_run_continues_the_table(tmp_path):
    first = started(tmp_path)
    for step in (1, 2, 3):
        first.metrics(step, {"loss": float(step)})
    second = started(tmp_path)
    second.metrics(2, {"loss": 20.0})
    second.finish(0)
    assert [(r["step"], r["loss"]) for r in table(tmp_path)] == [
        ("1", "1.0"),
        ("2", "20.0"),
        ("3", "3.0"),
    ]


def test_run_without_metrics_has_no_table(tmp_path):
    started(tmp_path).finish(1)
    assert list(tmp_path.iterdir()) == []
