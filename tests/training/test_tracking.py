"""Metrics wait on their device and go out together; a tracker never ends a run."""

import json

import pytest
import torch

from sandbox.contracts import StorageError
from sandbox.distributed.rank import Rank
from sandbox.runs.run import Run
from sandbox.training.tracking import MetricBuffer, Trackers


class Recorder:
    """A tracker that remembers its calls, and raises in those named."""

    def __init__(self, *broken: str) -> None:
        self.broken, self.calls = broken, []

    def __getattr__(self, name: str):
        def call(*values):
            self.calls.append((name, *values))
            if name in self.broken:
                raise ConnectionError("no network")

        return call


# --- buffer ---------------------------------------------------------------------------------------


def test_numbers_come_out_exactly_and_in_order():
    buffer = MetricBuffer()
    a, b = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)
    buffer.add(1, {"loss": a, "lr": 0.3, "clips": 7})
    buffer.add(2, {"loss": b})
    rows = [row[:2] for row in buffer.flush(Rank().mean)]
    assert rows == [(1, {"loss": a.item(), "lr": 0.3, "clips": 7}), (2, {"loss": b.item()})]


def test_buffer_is_empty_after_a_flush():
    buffer = MetricBuffer()
    buffer.add(1, {"loss": torch.tensor(1.0)})
    buffer.flush(Rank().mean)
    assert buffer.flush(Rank().mean) == []


def test_metrics_do_not_hold_the_graph():
    weight = torch.ones((), requires_grad=True)
    buffer = MetricBuffer()
    buffer.add(1, {"loss": weight * 2})
    assert buffer.rows[0][1]["loss"].grad_fn is None


def test_metric_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"metric loss.*\(2,\)"):
        MetricBuffer().add(1, {"loss": torch.ones(2)})


def test_numbers_that_are_not_finite_come_out_as_they_are():
    buffer = MetricBuffer()
    buffer.add(1, {"loss": torch.tensor(float("nan")), "x": torch.tensor(float("inf"))})
    values = buffer.flush(Rank().mean)[0][1]
    assert values["loss"] != values["loss"] and values["x"] == float("inf")


# --- trackers -------------------------------------------------------------------------------------


def test_every_tracker_and_the_run_get_the_metrics(tmp_path):
    a, b, run = Recorder(), Recorder(), Run(tmp_path)
    Trackers(run, [a, b]).metrics([(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    assert a.calls == b.calls == [("metrics", 1, {"loss": 1.0}), ("metrics", 2, {"loss": 2.0})]
    assert run.metrics() == {1: {"loss": 1.0}, 2: {"loss": 2.0}}


@pytest.mark.parametrize("broken", ["start", "metrics", "video", "images", "summary", "finish"])
def test_a_failing_tracker_is_reported_once_and_removed(tmp_path, caplog, broken):
    bad, good = Recorder(broken), Recorder()
    trackers = Trackers(Run(tmp_path), [bad, good])
    for _ in range(2):
        trackers.start({}, "name")
        trackers.metrics([(1, {"loss": 1.0})])
        trackers.video(1, "v", tmp_path / "v.mp4")
        trackers.images(1, "i", [tmp_path / "i.png"])
        trackers.summary({"score": 1.0})
    trackers.finish(0)
    assert len(good.calls) == 11
    assert [c[0] for c in bad.calls].count(broken) == 1
    assert caplog.text.count("not used from now on") == 1 and "no network" in caplog.text


def test_run_that_cannot_write_its_metrics_ends(tmp_path):
    run = Run(tmp_path)
    run.metrics_file.mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        Trackers(run).metrics([(1, {"loss": 1.0})])


def test_trackers_get_the_config_without_secrets(tmp_path):
    seen = Recorder()
    Trackers(Run(tmp_path), [seen]).start({"lr": 1, "password": "x"}, "name", "group")
    assert seen.calls == [("start", tmp_path, {"lr": 1, "password": "***"}, "name", "group")]


def test_finished_trackers_get_no_more_calls(tmp_path):
    seen = Recorder()
    trackers = Trackers(Run(tmp_path), [seen])
    trackers.finish(4)
    trackers.finish(0)
    assert seen.calls == [("finish", 4)]


def test_interrupt_is_not_swallowed(tmp_path):
    class Stopped(Recorder):
        def metrics(self, step, metrics):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers(Run(tmp_path), [Stopped()]).metrics([(1, {})])


def test_metrics_file_is_one_json_object_a_line(tmp_path):
    run = Run(tmp_path)
    Trackers(run).metrics([(3, {"loss": 0.5})])
    assert json.loads(run.metrics_file.read_text()) == {"step": 3, "loss": 0.5}
