"""The files of a finished run, and repeating its finish after a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sandbox import compose
from sandbox.cli.jobs import perform
from sandbox.config import registry
from sandbox.config.root import to_container
from sandbox.contracts import Clip, ConfigError, Preempted
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import Evaluation
from sandbox.reports.sample_files import file_name, write_clips, write_samples
from sandbox.runs.protocol import peak_memory, protocols, reset_peak_memory
from sandbox.runs.run import Run
from sandbox.storage import weight_files
from sandbox.tasks.train import train
from sandbox.training.build import load_system
from sandbox.training.finish import final_loss, print_scores, spread
from tests.training_sessions import differing, small

QUICK = ("steps=5", "data.fps=6", "task.score_clips=6", "task.samples=3", "task.untrained=false")


def settings(out, *overrides):
    root = replace(small(*QUICK, *overrides), out=str(out), cache=str(out / "cache"))
    return {"root": to_container(root), "overrides": [*QUICK, *overrides], "group": None}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return train(settings(tmp_path_factory.mktemp("outcome")), Rank())


@pytest.fixture
def folder(result):
    return Run(result["folder"]).folder


# --- a run folder ---------------------------------------------------------------------------------


def test_a_run_folder_is_complete(folder):
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "checkpoints", "config.yaml", "environment.json", "lock", "metrics.json", "metrics.jsonl",
        "report.html", "result.json", "samples", "samples.png", "scores_by_clip.json",
        "weights.safetensors", "weights_ema.safetensors",
    }  # fmt: skip
    videos = sorted(p.name for p in (folder / "samples").glob("*.mp4"))
    assert len(videos) == 3 and videos[0].startswith("000-a-")


def test_samples_play_as_fast_as_the_data(folder):
    for path in (folder / "samples").glob("*.mp4"):
        with av.open(path) as file:
            assert file.streams.video[0].average_rate == 6


def test_the_result_is_written_last(folder):
    others = [p for p in folder.rglob("*") if p.is_file() and p.name != "result.json"]
    newest = max(p.stat().st_mtime_ns for p in others)
    assert (folder / "result.json").stat().st_mtime_ns >= newest


def test_scores_and_what_they_mean_are_in_the_metrics(folder, result):
    found = json.loads((folder / "metrics.json").read_text())
    assert found["scores"]["model"] == result["scores"]
    assert {"model", "real clips", "mean clip"} <= found["scores"].keys()
    assert found["meaning"].keys() >= result["scores"].keys()
    assert found["clips"] == 6 and found["steps"] == 5 and found["skipped"] == {}


def test_every_number_carries_how_it_was_computed_and_what_it_took(folder, result):
    found = json.loads((folder / "metrics.json").read_text())
    assert found["protocols"].keys() >= {*result["scores"], "loss", "first_stage_psnr_db"}
    digit = found["protocols"]["digit"]
    assert (digit["clips"], digit["frames"], digit["weights"]) == (6, 9, "ema")
    assert found["cost"]["parameters"] >= found["cost"]["trained"] > 1000
    assert found["cost"]["peak_memory_mib"] > 1
    data = json.loads((folder / "environment.json").read_text())["data"]
    assert data["train"]["clips"] > 0 and data["train"]["ids"] != data["val"]["ids"]


def test_a_network_that_judges_is_named_by_its_content_and_not_by_its_place(tmp_path):
    def judged_by(place: str, content: bytes) -> dict:
        file = tmp_path / place
        file.write_bytes(content)
        root = small("metric=reconstruction", f"metric.lpips={file}")
        return protocols(root, Clip(3, 9, 16, 16), 4, "ema", ["psnr"])["psnr"]

    assert judged_by("a", b"one") == judged_by("b", b"one") != judged_by("a", b"other")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="wants Linux")
def test_memory_is_that_since_a_run_began_whatever_was_there_before():
    """As of a first stage that the first run of a sweep trains, or the runs of a notebook."""
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    taken = torch.ones(2**28)  # 1 GiB: the system may take hundreds of MiB of others' meanwhile
    assert peak_memory(cpu) > before + 200
    del taken
    assert peak_memory(cpu) > before + 200
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before + 100


UNUSED = """
import torch
from sandbox.comparable import reset_peak_memory, peak_memory

gpu = torch.device("cuda", 0)
reset_peak_memory(gpu)
print(peak_memory(gpu))
"""


def test_a_gpu_that_nothing_has_used_has_no_peak():
    """As where a run begins; torch refuses to reset it. In a process that has used none."""
    done = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True)
    assert float(done.stdout) == 0, done.stderr


def test_scores_are_the_means_of_those_of_the_clips(folder, result):
    found = json.loads((folder / "scores_by_clip.json").read_text())
    assert len(found["captions"]) == 6
    for name, values in found["scores"].items():
        assert sum(values) / 6 == pytest.approx(result["scores"][name], abs=1e-6)


def test_exported_weights_are_those_of_the_checkpoint(folder):
    for name, weights in ((weight_files.LIVE, "live"), (weight_files.AVERAGED, "ema")):
        system = load_system(folder, weights)
        assert not differing(dict(system.trainable_state()), weight_files.read(folder / name))


def test_exported_weights_can_be_started_from(folder, tmp_path):
    start = folder / weight_files.AVERAGED
    found = train(settings(tmp_path, f"init_from={start}", "lr=0", "steps=1"), Rank())
    weights = weight_files.read(Run(found["folder"]).folder / weight_files.LIVE)
    assert not differing(weight_files.read(start), weights)


def test_a_run_that_continues_does_not_read_its_beginning_again(result, folder, tmp_path):
    """Resuming and initialising are different things: the file may be another one by then."""
    start = shutil.copy(folder / weight_files.AVERAGED, tmp_path / "start.safetensors")
    words = (f"init_from={start}", "lr=0", "steps=1")
    found = train(settings(tmp_path, *words), Rank())
    (Path(found["folder"]) / "result.json").unlink()
    Path(start).write_text("no weights")
    assert train(settings(tmp_path, *words), Rank()) == found


# --- again ----------------------------------------------------------------------------------------


def test_a_run_killed_before_its_result_finishes_with_the_same_scores(result, folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.glob("samples/*.mp4")}
    metrics = (folder / "metrics.jsonl").read_text()
    for name in ("result.json", "metrics.json", "report.html", weight_files.LIVE):
        (folder / name).unlink()
    again = train(settings(folder.parent), Rank())
    assert again == result
    assert {p.name: p.read_bytes() for p in folder.glob("samples/*.mp4")} == before
    assert (folder / "metrics.jsonl").read_text().startswith(metrics)
    said = capsys.readouterr().out
    assert "(resumed)" in said and "resuming from step 5" in said


def test_finishing_stops_on_request_and_is_completed_later(result, tmp_path):
    class Asked(Rank):
        """A process with a stop request during the scoring."""

        def agree_to_stop(self):
            return None

    rank = Asked()
    rank.request_stop(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM after the last step"):
        train(settings(tmp_path), rank)
    assert not list(tmp_path.glob("*/result.json"))
    assert train(settings(tmp_path), Rank())["scores"] == result["scores"]


def test_a_finished_run_is_left_alone_and_another_begins(result, folder):
    other = train(settings(folder.parent), Rank())
    assert other["folder"] == f"{folder}-2"
    assert other["scores"] == result["scores"]
    assert other["loss"] == result["loss"]


def test_the_evaluating_task_gives_the_same_scores(result, folder):
    root = replace(small(*QUICK), out=str(folder.parent), cache=str(folder.parent / "cache"))
    task = replace(registry.default("task", "evaluate"), run=str(folder), clips=6, samples=2)
    found = [perform(replace(root, task=task))["scores"] for _ in range(2)]
    assert found == [result["scores"]] * 2
    names = sorted(p.name for p in (folder / "evaluations").iterdir())
    stems = ("evaluation-01", "evaluation-02")
    assert names == [f"{s}.{end}" for s in stems for end in ("json", "png")]


# --- what a sweeper gets --------------------------------------------------------------------------


def test_the_objective_is_the_first_score(result):
    assert result["objective"] == result["scores"]["direction"]


def test_the_objective_may_be_named(tmp_path):
    found = train(settings(tmp_path, "task.objective=loss"), Rank())
    run = Run(found["folder"])
    assert found["objective"] == found["loss"] == run.metrics()[5]["loss"] == final_loss(run)


def test_an_objective_that_is_not_there_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.objective='beauty': want one of \['direction'"):
        train(settings(tmp_path, "task.objective=beauty"), Rank())
    assert not list(tmp_path.glob("*/config.yaml"))


def test_the_final_loss_is_the_mean_over_the_last_tenth(tmp_path):
    run = Run(tmp_path)
    run.record_all([(i, {"loss": float(i)}) for i in range(1, 41)])
    assert final_loss(run) == (37 + 38 + 39 + 40) / 4
    assert math.isnan(final_loss(Run(tmp_path / "none")))


# --- parts ----------------------------------------------------------------------------------------


def test_clips_of_one_frame_are_pictures(tmp_path):
    video = torch.rand(2, 3, 1, 5, 7) * 2 - 1
    paths = write_clips(tmp_path, ["", "a b"], video)
    assert [p.name for p in paths] == ["000-clip.png", "001-a-b.png", "sheet.png"]
    with Image.open(paths[1]) as image:
        pixels = torch.from_numpy(np.asarray(image).copy())
    want = ((video[1, :, 0] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pixels.permute(2, 0, 1), want)


def test_file_names_hold_letters_digits_and_dashes():
    assert file_name("A red 3, moving left!") == "a-red-3-moving-left"
    assert file_name("../../etc/passwd") == "etc-passwd"
    assert file_name("\u732b") == "clip"
    assert len(file_name("word " * 50)) <= 60


def test_shown_clips_have_different_captions_spread_over_all():
    captions = ["a", "b", "a", "c", "d", "b"]
    assert spread(captions, 2) == [0, 3]
    assert spread(captions, 9) == [0, 1, 3, 4]
    assert spread(["", "", ""], 2) == [0, 1]
    assert spread(captions, 0) == []


def test_clips_are_written_with_a_sheet(tmp_path):
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    paths = write_clips(tmp_path / "new", ["a red 3", "a red 3"], video)
    assert [p.name for p in paths] == ["000-a-red-3.mp4", "001-a-red-3.mp4", "sheet.png"]
    assert all(p.stat().st_size for p in paths)


def test_samples_of_each_call_stay_and_say_what_made_them(tmp_path):
    for captions, seed in ((["a", "b"], 1), (["c"], 2), (["d"], 3)):
        video = torch.zeros(len(captions), 3, 1, 4, 4)
        made_by = {"seed": seed, "task": {"password": "x"}}
        write_samples(tmp_path / "prompts", captions, video, 8.0, made_by)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*.png")}
    assert {name for name in left if "sheet" not in name} == {
        "prompts/000-a.png", "prompts/001-b.png", "prompts-2/000-c.png", "prompts-3/000-d.png"
    }  # fmt: skip
    record = json.loads((tmp_path / "prompts-3" / "samples.json").read_text())
    assert record == {"seed": 3, "task": {"password": "***"}, "clips": {"000-d.png": "d"}}


def test_samples_that_are_made_at_once_have_a_folder_each(tmp_path):
    def one(number: int) -> Path:
        clips = ["a"] * number, torch.zeros(number, 3, 1, 4, 4)
        return write_samples(tmp_path / "to", *clips, 8.0, {"seed": number})[0].parent

    with ThreadPoolExecutor(4) as pool:
        folders = [*pool.map(one, range(1, 5))]
    for number, folder in enumerate(folders, 1):
        assert json.loads((folder / "samples.json").read_text())["seed"] == number
        assert len([*folder.glob("*-a.png")]) == number


def test_the_sheet_shows_the_images_that_the_model_was_given_before_its_clips(tmp_path):
    video, given = torch.zeros(1, 3, 3, 16, 16), torch.full((1, 3, 2, 16, 16), 1.0)
    *_, plain = write_clips(tmp_path / "plain", [""], video)
    *_, sheet = write_clips(tmp_path / "given", [""], video, given=given)
    with Image.open(plain) as a, Image.open(sheet) as b:
        assert b.width > a.width
        first = np.asarray(b.convert("L"))[b.height // 2] == 255
    assert first.sum() >= 32 and first.nonzero()[0].max() < b.width - a.width // 3


@pytest.mark.parametrize("conditioning", ["words", "none"])
def test_caption_scores_of_an_unconditional_model_are_marked_as_chance(conditioning, capsys):
    found = Evaluation({"model": {"digit": 0.1}}, {"digit": "chance 0.1"}, [], {}, count=1)
    print_scores(compose(f"conditioning={conditioning}"), found)
    assert ("not conditioned on captions" in capsys.readouterr().out) == (conditioning == "none")
