"""data=class_folder: classes, splits, unusable and unlabelled files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.data.class_folder import ClassFolder
from sandbox.contracts import BadItem, DataError
from sandbox.data.loader import batches
from sandbox.data.randomness import keyed
from sandbox.reports.media import write_video

CONFIG = ClassFolder.Config(frames=1, height=8, width=8)


def image(path: Path, grey: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)


def source(root: Path, **settings) -> ClassFolder:
    return ClassFolder(replace(CONFIG, root=str(root), **settings))


def names(root: Path, **settings) -> dict[str, list[str]]:
    plugin = source(root, **settings)
    return {side: plugin.split(side).names for side in ("train", "val")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of each of three classes, darker in later ones; one is in a deeper folder."""
    for i, name in enumerate(("Walk", "Jump", "Run")):
        for k in range(3):
            image(tmp_path / name / ("deep" if k else "") / f"{k}.png", 60 * i + k)
    return tmp_path


def test_classes_are_numbered_by_name_and_every_clip_has_that_of_its_folder(folder):
    plugin = source(folder, num_classes=3)
    for side in ("train", "val"):
        items = plugin.split(side)
        for i, name in enumerate(items.names):
            sample = items.load(i, keyed(0))
            assert sample["caption"] == name.split("/")[0]
            assert sample["label"] == ["Jump", "Run", "Walk"].index(sample["caption"])
            assert sample["video"].shape == (3, 1, 8, 8)
    assert plugin.label("Run") == 1 and plugin.label("Swim") is None
    assert plugin.prompts() == ["Jump", "Run", "Walk"]


def test_batches_have_labels(folder):
    (batch,) = batches(source(folder, num_classes=3).split("train"), 16)
    known = {"Jump": 0, "Run": 1, "Walk": 2}
    assert batch.scalars["label"].tolist() == [known[c] for c in batch.captions]


def test_another_number_of_classes_is_an_error_that_names_the_right_one(folder):
    with pytest.raises(DataError, match=r"num_classes=2: there are 3 .*Jump, Run, Walk.*=3"):
        source(folder).split("train")


def test_clips_of_a_recording_are_on_one_side(tmp_path):
    for group in range(12):
        for clip in range(4):
            image(tmp_path / "Jump" / f"v_Jump_g{group:02}_c{clip:02}.png")
    sides = names(tmp_path, num_classes=1, val_fraction=0.3)
    groups = [{n.rpartition("_")[0] for n in of_side} for of_side in sides.values()]
    assert all(groups) and not groups[0] & groups[1]
    assert sum(map(len, sides.values())) == 48


def test_train_and_val_folders_are_the_splits(tmp_path):
    for name in ("train/A/1.png", "train/B/2.png", "val/A/3.png", "other/A/4.png"):
        image(tmp_path / name)
    plugin = source(tmp_path)
    assert plugin.split("train").names == ["train/A/1.png", "train/B/2.png"]
    assert plugin.split("val").names == ["val/A/3.png"]
    assert plugin.split("val").load(0, keyed(0))["label"] == 0
    assert plugin.split("train").found.unused == {"clips outside train/ and val/": 1}


def test_lists_as_in_ucf_101_are_the_splits(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.txt").write_text("Walk/0.png 3\nRun/0.png 2\nRun/gone.png 2\n\n")
    (lists / "val.txt").write_text(f"{folder}/Jump/0.png\n")
    paths = {"train_list": str(lists / "train.txt"), "val_list": str(lists / "val.txt")}
    plugin = source(folder, num_classes=3, **paths)
    assert plugin.split("train").names == ["Run/0.png", "Walk/0.png"]
    assert plugin.split("val").names == ["Jump/0.png"]
    assert plugin.split("val").load(0, keyed(0))["label"] == 0
    unused = plugin.split("train").found.unused
    assert unused == {"names of a list without a usable file": 1, "files that no list names": 6}
    (lists / "val.txt").write_text("Walk/0.png\n")
    with pytest.raises(DataError, match=r"1 names are also in train_list, such as 'Walk/0.png'"):
        source(folder, num_classes=3, **paths).split("train")


def test_files_that_are_not_used_are_counted_by_reason(folder, caplog):
    image(folder / "outside.png")
    (folder / "Run" / "notes.doc").write_text("x")
    (folder / "Walk" / "again.png").hardlink_to(folder / "Walk" / "0.png")
    source(folder, num_classes=3).split("train")
    for reason in (
        "1 clips without a class, because no folder of a class has them",
        "1 .doc files, which are not read",
        "1 second names of a file",
    ):
        assert reason in caplog.text


def test_an_unreadable_file_is_named_and_left_out(folder):
    for path in folder.rglob("1.png"):
        path.write_text("no image")
    items = source(folder, num_classes=3, val_fraction=0.01).split("train")
    found = [*batches(items, 16)]
    bad = [line for batch in found for line in batch.bad]
    unreadable = [n for n in items.names if n.endswith("1.png")]
    assert {line.split(":")[0] for line in bad} == {*unreadable}
    assert all("cannot be read as an image" in line for line in bad)
    with pytest.raises(BadItem):
        items.load(items.names.index(unreadable[0]), keyed(0))


def test_videos_have_frames_and_rates(tmp_path):
    for name in ("A/1.mp4", "A/2.mp4", "B/3.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        write_video(path, torch.zeros(3, 6, 16, 16), 8.0)
    image(tmp_path / "B" / "4.png")
    plugin = source(tmp_path, frames=3, stride=2)
    sample = plugin.split("train").load(0, keyed(0))
    assert sample["video"].shape == (3, 3, 8, 8)
    assert sample["fps"] == 4 and sample["frame_stride"] == 2
    assert plugin.split("train").found.unused == {"images, because data.frames=3": 1}


def test_a_folder_without_classes_is_an_error(tmp_path):
    image(tmp_path / "1.png")
    with pytest.raises(DataError, match="1 clips without a class"):
        source(tmp_path).split("train")
