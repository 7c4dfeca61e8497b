"""CogVideoX's folder format: captions of clips, frames, sizes, images, splits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.data.cogvideox_folder import CogVideoXFolder
from sandbox.contracts import BadItem, ConfigError, DataError
from sandbox.data import Loader, batches
from sandbox.randomness import keyed
from sandbox.wiring import wire
from tests.helpers import composed
from tests.plugins.data.test_video_folder import levels, write_video

CONFIG = CogVideoXFolder.Config(frames=3, height=16, width=16)


def made(root: Path, count: int = 8, frames: int = 3) -> Path:
    """Clip i starts with grey level i and has the caption "level i"."""
    for i in range(count):
        write_video(root / f"videos/{i}.mp4", frames, first=i)
    listed(root, "prompts.txt", [f"level {i}" for i in range(count)])
    listed(root, "videos.txt", [f"videos/{i}.mp4" for i in range(count)])
    return root


def listed(root: Path, name: str, lines: list[str]) -> None:
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def split(root: Path, name: str = "train", **settings):
    return CogVideoXFolder(replace(CONFIG, root=str(root), **settings)).split(name)


def load(samples, name: str) -> dict:
    at = next(i for i in range(len(samples)) if samples.id(i) == name)
    return samples.load(at, keyed(0))


def test_a_caption_belongs_to_the_clip_of_its_line(tmp_path):
    samples = [split(made(tmp_path), name) for name in ("train", "val")]
    shown = [
        (s["caption"], f"level {levels(s['video'])[0]}")
        for part in samples
        for s in (part.load(i, keyed(0)) for i in range(len(part)))
    ]
    assert len(shown) == 8
    assert all(caption == level for caption, level in shown)


def test_lists_of_different_lengths_name_both(tmp_path):
    listed(made(tmp_path), "prompts.txt", ["only", "three", "lines"])
    with pytest.raises(DataError, match=r"prompts\.txt has 3 lines and .*videos\.txt has 8"):
        split(tmp_path)


def test_a_line_that_is_empty_in_only_one_list_is_an_error(tmp_path):
    made(tmp_path, 4)
    listed(tmp_path, "prompts.txt", ["level 0", "", "level 1", "level 2"])
    with pytest.raises(DataError, match="line 2 is empty"):
        split(tmp_path)


def test_a_line_that_is_empty_in_all_lists_is_skipped(tmp_path):
    made(tmp_path, 3)
    listed(tmp_path, "prompts.txt", ["level 0", "", "level 2", "", ""])
    listed(tmp_path, "videos.txt", ["videos/0.mp4", "", "videos/2.mp4"])
    both = [split(tmp_path, name) for name in ("train", "val")]
    assert sorted(r.caption for part in both for r in part.rows) == ["level 0", "level 2"]


@pytest.mark.parametrize("name", ["../videos/0.mp4", "/videos/0.mp4", "videos/0.txt"])
def test_paths_outside_the_folder_and_other_file_types_are_errors(tmp_path, name):
    made(tmp_path, 2)
    listed(tmp_path, "videos.txt", [name, "videos/1.mp4"])
    with pytest.raises(DataError, match="line 1"):
        split(tmp_path)


def test_missing_and_broken_videos_are_skipped_and_reported(tmp_path):
    made(tmp_path)
    train = split(tmp_path)
    gone, broken = (row.video for row in train.rows[:2])
    (tmp_path / gone).unlink()
    (tmp_path / broken).write_bytes(b"no video")
    loader = Loader(split(tmp_path), 2, 0)
    seen = [(c, f"level {levels(v)[0]}") for b in loader for c, v in zip(b.captions, b.video)]  # noqa: B905
    assert set(loader.bad) == {gone, broken}
    assert all(caption == level for caption, level in seen)


def test_a_folder_without_any_of_its_videos_is_an_error(tmp_path):
    made(tmp_path, 2)
    listed(tmp_path, "videos.txt", ["clips/0.mp4", "clips/1.mp4"])
    with pytest.raises(DataError, match="none of its 2 videos"):
        split(tmp_path)


@pytest.mark.parametrize(
    ("frames", "settings", "want"),
    [
        (2, {}, [0, 1, 1]),  # the last frame is repeated
        (5, {}, [0, 1, 2]),
        (7, {}, [0, 2, 4]),  # every 7 // 3 = 2nd
        (7, {"frame_stride": 3}, [0, 3, 6]),
        (7, {"frame_stride": 6}, [0, 6, 6]),
    ],
)
def test_frames_are_chosen_as_published(tmp_path, frames, settings, want):
    samples = split(made(tmp_path, 2, frames), **settings)
    sample = samples.load(0, keyed(0))
    first = int(sample["caption"].split()[1])
    assert [level - first for level in levels(sample["video"])] == want


@pytest.mark.parametrize(("stride", "frames"), [(None, 7), (1, 7), (2, 3), (4, 1)])
def test_buckets_count_the_frames_left_by_the_stride(tmp_path, stride, frames):
    """Otherwise repetitions of the last frame would fill most of the clip."""
    samples = split(made(tmp_path, 2, 7), frame_stride=stride, buckets=("1x16x16", "7x16x16"))
    video = samples.load(0, keyed(0))["video"]
    assert video.shape[1] == frames
    assert len(set(levels(video))) == frames


def test_clips_take_the_bucket_with_most_frames_and_nearest_aspect(tmp_path):
    shapes = {
        "a": (9, 16, 16),
        "b": (3, 16, 32),
        "c": (4, 64, 32),
        "d": (1, 8, 8),
        "e": (9, 16, 48),
    }
    for name, (frames, height, width) in shapes.items():
        write_video(tmp_path / f"videos/{name}.mp4", frames, height=height, width=width)
    listed(tmp_path, "videos.txt", [f"videos/{name}.mp4" for name in shapes])
    listed(tmp_path, "prompts.txt", [*shapes])
    buckets = ("3x16x32", "3x32x16", "9x16x16", "9x16x32")
    parts = [split(tmp_path, name, buckets=buckets) for name in ("train", "val")]
    found = {
        sample["caption"]: tuple(sample["video"].shape[1:])
        for part in parts
        for sample in (part.load(i, keyed(0)) for i in range(len(part)))
    }
    assert found == {"a": (9, 16, 16), "b": (3, 16, 32), "c": (3, 32, 16), "d": (3, 16, 16),
                     "e": (9, 16, 32)}  # fmt: skip
    loaded = [*Loader(parts[0], 2, 0)]
    assert sum(b.size for b in loaded) == len(parts[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buckets": ("49x480",)}, "buckets='49x480': want frames x height x width"),
        ({"buckets": ("0x16x16",)}, "buckets='0x16x16'"),
        ({"buckets": ("9x16x16",), "bucket_batch_sizes": (1, 2)}, "bucket_batch_sizes has 2"),
        ({"buckets": ("9x16x16",), "bucket_batch_sizes": (0,)}, "bucket_batch_sizes=0"),
    ],
)
def test_bad_buckets_are_reported(settings, message):
    assert any(message in p for p in replace(CONFIG, **settings).problems())


def test_each_bucket_has_its_batch_size():
    cfg = replace(CONFIG, buckets=("9x16x16", "9x32x32"), bucket_batch_sizes=(4, 2), batch_size=8)
    assert [(c.frames, c.height, cfg.batch_of(c)) for c in cfg.clips()] == [
        (3, 16, 8), (9, 16, 4), (9, 32, 2),
    ]  # fmt: skip


def test_short_videos_are_unusable_without_padding(tmp_path):
    samples = split(made(tmp_path, 2, 2), pad_short=False)
    with pytest.raises(BadItem, match="has 2 frames"):
        samples.load(0, keyed(0))


def test_images_are_cropped_or_stretched_to_the_size(tmp_path):
    made(tmp_path, 2)
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255  # the middle third
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(wide).save(tmp_path / f"images/{i}.png")
    listed(tmp_path, "images.txt", ["images/0.png", "images/1.png"])
    covered, stretched = (
        split(tmp_path, images="images.txt", resize=how).load(0, keyed(0))["image"]
        for how in ("cover", "stretch")
    )
    assert covered.shape == (3, 1, 16, 16)
    assert covered.min() == 1
    assert stretched[..., 0].max() < 0
    assert stretched[..., 8].min() == 1


def test_images_reach_the_batch(tmp_path):
    made(tmp_path, 2)
    for i in range(2):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"{i}.png")
    listed(tmp_path, "pictures.txt", ["0.png", "1.png"])
    batch = next(batches(split(tmp_path, images="pictures.txt"), 1))
    assert batch.image.shape == (1, 3, 1, 16, 16)


def test_id_token_is_the_prefix_of_every_caption(tmp_path):
    source = CogVideoXFolder(replace(CONFIG, root=str(made(tmp_path)), id_token="BW_STYLE"))
    assert all(p.startswith("BW_STYLE level ") for p in source.prompts())
    assert source.split("train").load(0, keyed(0))["caption"].startswith("BW_STYLE level ")


def test_a_validation_folder_must_not_share_videos(tmp_path):
    train, val = made(tmp_path / "a", 3), made(tmp_path / "b", 2)
    assert len(split(train, val_root=str(val))) == 3
    assert len(split(train, "val", val_root=str(val))) == 2
    (val / "videos/1.mp4").unlink()
    (val / "videos/1.mp4").hardlink_to(train / "videos/0.mp4")
    with pytest.raises(DataError, match=r"is also in data\.root"):
        split(train, val_root=str(val))


def test_a_video_with_two_captions_is_in_one_split_under_two_ids(tmp_path):
    made(tmp_path)
    listed(tmp_path, "prompts.txt", [f"level {i % 8}" for i in range(16)])
    listed(tmp_path, "videos.txt", [f"videos/{i % 8}.mp4" for i in range(16)])
    sides = [{row.video for row in split(tmp_path, name).rows} for name in ("train", "val")]
    assert not sides[0] & sides[1]
    train = split(tmp_path)
    assert len({train.id(i) for i in range(len(train))}) == len(train)


def test_the_content_hash_depends_on_bytes_and_caption(tmp_path):
    made(tmp_path, 2)
    before = split(tmp_path).content(0)
    assert split(tmp_path).content(0) == before
    name = split(tmp_path).rows[0].video
    write_video(tmp_path / name, 3, first=20)
    assert split(tmp_path).content(0) != before
    assert split(tmp_path, id_token="new").content(0) != split(tmp_path).content(0)


@pytest.mark.parametrize(
    ("transformer", "frames", "near"),
    [("2b", 50, (49, 57)), ("1_5_5b", 80, (73, 81)), ("1_5_5b", 82, (81, 89))],
)
def test_a_wrong_number_of_frames_is_an_error_with_the_two_nearest(transformer, frames, near):
    root = composed(
        "data=cogvideox_folder", f"data.frames={frames}", "data.height=480", "data.width=720",
        "vae=cogvideox_5b", f"backbone=cogvideox_{transformer}", "conditioning=t5",
        "schedule=ddpm_cogvideox_5b", "sampler=ddim_cogvideox", "data.root=clips",
    )  # fmt: skip
    with pytest.raises(ConfigError) as e:
        wire(root)
    assert f"use data.frames={near[0]} or data.frames={near[1]}" in str(e.value)


def test_pixels_are_in_range(tmp_path):
    video = split(made(tmp_path, 2)).load(0, keyed(0))["video"]
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
