"""A folder of videos: frames, captions, splits, unusable files."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from plugins.data.video_folder import VideoFolder
from sandbox.contracts import BadItem, DataError
from sandbox.data.loader import Loader, batches
from sandbox.data.randomness import keyed

CONFIG = VideoFolder.Config(frames=3, height=16, width=16)
STEP = 8  # grey levels between frames


def write_video(
    path: Path, frames: int = 6, first: int = 0, height: int = 16, width: int = 16
) -> None:
    """10 fps; frame i is grey, 8 * (first + i). Codecs lose a level or two, never 4."""
    codec = {".mp4": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:].lower()
    with path.open("wb") as file, av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = height, width
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 10_000_000
        for i in range(frames):
            grey = np.full((height, width, 3), STEP * (first + i), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


def captioned(root: Path, names: list[str]) -> None:
    """Video i of `names` starts with frame level 4 i and has the caption "number i"."""
    for number, name in enumerate(names):
        write_video(root / name, 3, first=4 * number)
        (root / name).with_suffix(".txt").write_text(f" number\n {number} ", encoding="utf-8")


def levels(video: torch.Tensor) -> list[int]:
    """Frame numbers of `write_video` in a clip."""
    return ((video.mean((0, 2, 3)) + 1) * 127.5 / STEP).round().int().tolist()


def items(root: Path, split: str = "train", **settings):
    return VideoFolder(replace(CONFIG, root=str(root), captions="none", **settings)).split(split)


def load(files, name: str, key: object = 0) -> dict:
    return files.load(files.names.index(name), keyed(key))


def split_of(root: Path, **settings) -> dict[str, set[str]]:
    return {name: set(items(root, name, **settings).names) for name in ("train", "val")}


# --- frames ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, one per split."""
    write_video(tmp_path / "train" / "a.mp4", 12)
    write_video(tmp_path / "val" / "b.mp4", 12)
    return tmp_path


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif", "MP4"])
def test_every_container_is_decoded(tmp_path, ending):
    write_video(tmp_path / "train" / f"a.{ending}", 6)
    write_video(tmp_path / "val" / "b.mp4", 6)
    clip = load(items(tmp_path, start="centre"), f"train/a.{ending}")
    assert levels(clip["video"]) == [1, 2, 3]
    assert clip["video"].shape == (3, 3, 16, 16) and clip["video"].dtype == torch.float32


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_frames_are_a_stride_apart_and_fps_is_divided_by_it(folder, stride):
    clip = load(items(folder, stride=stride, start="centre"), "train/a.mp4")
    first = (12 - (2 * stride + 1)) // 2
    assert levels(clip["video"]) == [first, first + stride, first + 2 * stride]
    assert clip["fps"] == pytest.approx(10 / stride)
    assert clip["frame_stride"] == stride


def test_a_random_start_depends_on_the_key_and_covers_the_range(folder):
    files = items(folder)
    starts = [levels(load(files, "train/a.mp4", key)["video"])[0] for key in range(60)]
    assert starts == [levels(load(files, "train/a.mp4", key)["video"])[0] for key in range(60)]
    assert set(starts) == set(range(10))


def test_validation_uses_the_middle_for_every_key(folder):
    files = items(folder, "val", crop="random")
    assert [levels(load(files, "val/b.mp4", key)["video"]) for key in (1, 2)] == [[4, 5, 6]] * 2


def test_seeking_gives_the_frames_of_sequential_decoding(tmp_path):
    """Between key frames, with B-frames."""
    for name in ("train/a.mp4", "val/b.mp4"):
        path = tmp_path / name
        path.parent.mkdir()
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
            stream.options = {"g": "7", "bf": "3"}
            rng = np.random.default_rng(0)
            for _ in range(40):
                noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            container.mux(stream.encode())
    with av.open(str(tmp_path / "train/a.mp4")) as container:
        plain = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    files, found = items(tmp_path, stride=2), set()
    for key in range(40):
        clip = ((load(files, "train/a.mp4", key)["video"] + 1) * 127.5).round().byte()
        frames = clip.permute(1, 2, 3, 0).numpy()
        starts = [i for i in range(36) if np.array_equal(plain[i : i + 5 : 2], frames)]
        assert len(starts) == 1
        found |= set(starts)
    assert len(found) > 10


# --- size -----------------------------------------------------------------------------------------


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_centre_crops_without_resizing_copy_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, pixels)
    clip = items(tmp_path, frames=1).load(0, keyed(0))
    expected = torch.from_numpy(pixels[:, 4:20]).permute(2, 0, 1)[:, None] / 127.5 - 1
    torch.testing.assert_close(clip["video"], expected, atol=1e-6, rtol=0)  # float32 rounding


def test_random_crops_cover_the_range(tmp_path):
    columns = np.arange(0, 240, 10, dtype=np.uint8)  # 24 of them
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, np.broadcast_to(columns[None, :, None], (16, 24, 3)).copy())
    files = items(tmp_path, frames=1, crop="random")
    lefts = {
        round(float((files.load(0, keyed(k))["video"][0, 0, 0, 0] + 1) * 127.5 / 10))
        for k in range(80)
    }
    assert lefts == set(range(9))


def test_downscaling_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name, stripes)
    clip = items(tmp_path, frames=1).load(0, keyed(0))
    assert clip["video"].abs().max() < 0.1  # grey: without a filter, stripes of -1 and 1


def test_all_image_formats_are_read_with_one_frame(tmp_path):
    pixels = np.full((16, 16, 3), 200, np.uint8)
    for name in ("a.png", "b.jpg", "c.jpeg", "d.webp", "e.PNG"):
        write_image(tmp_path / name, pixels)
    write_video(tmp_path / "f.mp4", 1, first=25)
    (train, val) = (items(tmp_path, side, frames=1) for side in ("train", "val"))
    for files in (train, val):
        for index in range(len(files)):
            sample = files.load(index, keyed(0))
            assert sample.keys() == {"video"}
            assert sample["video"].shape == (3, 1, 16, 16)
            assert levels(sample["video"]) == [25]


def test_images_are_excluded_and_counted_with_several_frames(folder, caplog):
    write_image(folder / "train" / "c.png", np.zeros((16, 16, 3), np.uint8))
    files = items(folder)
    assert files.names == ["train/a.mp4"]
    assert list(files.excluded.values()) == [1]
    assert "1 images, because data.frames=3" in caplog.text


# --- captions -------------------------------------------------------------------------------------

NAMES = ["train/a.mp4", "train/b.mp4", "train/c.mp4", "train/d.mp4", "val/e.mp4"]


def with_captions(root: Path, split: str = "train", **settings):
    return VideoFolder(replace(CONFIG, root=str(root), **settings)).split(split)


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("missing", ["train/a.mp4", "train/b.txt", "train/c.mp4"])
def test_a_caption_never_shifts_to_another_clip(tmp_path, missing):
    captioned(tmp_path, NAMES)
    if missing.endswith(".mp4"):
        corrupt(tmp_path / missing)
    else:
        (tmp_path / missing).unlink()
    loader = Loader(with_captions(tmp_path), batch_size=4, seed=0)
    seen = [
        (caption, levels(video)[0])
        for _ in range(5)
        for batch in loader
        for caption, video in zip(batch.captions, batch.video, strict=True)
    ]
    assert all(caption == f"number {level // 4}" for caption, level in seen)
    assert len(set(seen)) == 3
    assert list(loader.bad) == [missing.replace(".txt", ".mp4")]


def test_captions_csv_gives_captions_by_file_name(tmp_path):
    for name in NAMES:
        write_video(tmp_path / name, 3)
    lines = ["caption,file,more"]
    lines += [f'"of {n}, yes",{"./" if n.endswith("b.mp4") else ""}{n},x' for n in NAMES]
    (tmp_path / "captions.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    files = with_captions(tmp_path)
    assert [load(files, n)["caption"] for n in files.names] == [f"of {n}, yes" for n in NAMES[:4]]


def test_captions_csv_of_a_split_folder_names_files_in_it(tmp_path):
    for name in NAMES:
        write_video(tmp_path / name, 3)
    (tmp_path / "val" / "captions.csv").write_text("file,caption\ne.mp4,last\n")
    assert VideoFolder(replace(CONFIG, root=str(tmp_path))).prompts() == ["last"]


@pytest.mark.parametrize("missing_caption, bad", [("skip", 1), ("empty", 0)])
def test_a_file_without_a_caption_is_unusable_or_has_an_empty_one(tmp_path, missing_caption, bad):
    captioned(tmp_path, NAMES)
    (tmp_path / "train" / "b.txt").write_text(" \n")
    files = with_captions(tmp_path, missing_caption=missing_caption)
    found = list(batches(files, 4))
    assert [len(b.bad) for b in found] == [bad]
    captions = ["number 0", "", "number 2", "number 3"]
    assert found[0].captions == [c for c in captions if c or not bad]


def test_a_caption_that_is_not_utf8_is_a_bad_item(tmp_path):
    captioned(tmp_path, NAMES)
    (tmp_path / "train" / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadItem, match=r"its caption b\.txt cannot be read"):
        load(with_captions(tmp_path), "train/b.mp4")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("name,text\na,b\n", r"want the columns file and caption, there are \['name', 'text'\]"),
        ("", r"want the columns file and caption, there are \[\]"),
        ("file,caption\ntrain/a.mp4,one, two\n", "line 2: want 2 entries; quote commas"),
        ("caption,file\nalone\n", "line 2: want 2 entries"),
        ("file,caption\ntrain/a.mp4,x\ntrain/a.mp4,y\n", "'train/a.mp4' has two captions"),
        (
            "file,caption\nelsewhere.mp4,x\n",
            "none of its 1 files is there, such as 'elsewhere.mp4'",
        ),
        ('file,caption\ntrain/a.mp4,"open\n', "cannot be read"),
    ],
)
def test_a_broken_table_is_an_error(folder, text, problem):
    (folder / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        with_captions(folder)


def test_prompts_are_the_first_captions_of_the_validation_split(tmp_path):
    names = [f"val/{c}.mp4" for c in "abcdef"]
    captioned(tmp_path, [*names, "train/x.mp4"])
    (tmp_path / "val" / "b.txt").unlink()
    source = VideoFolder(replace(CONFIG, root=str(tmp_path), num_prompts=3))
    assert source.prompts() == ["number 0", "number 2", "number 3"]
    assert VideoFolder(replace(CONFIG, captions="none")).prompts() == []


def test_provided_fields_depend_on_the_settings():
    moving = {"video", "fps", "frame_stride"}
    assert CONFIG.provides() == moving | {"captions", "prompts"}
    assert replace(CONFIG, captions="none").provides() == moving
    assert replace(CONFIG, num_prompts=0, frames=1).provides() == {"video", "captions"}


# --- files that cannot be used --------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.mp4")


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n")


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda p: p.write_bytes(b""), "cannot be decoded"),
        (lambda p: p.write_bytes(b"\0" * 5000), "cannot be decoded"),
        (truncate, "cannot be decoded"),
        (lambda p: write_video(p, 2), "has 2 frames, want 3"),
        (break_link, "No such file"),
        (playlist, "cannot be decoded"),
    ],
    ids=["empty", "zeros", "truncated", "short", "broken link", "playlist"],
)
def test_a_broken_video_is_skipped_and_reported(tmp_path, harm: Callable, reason):
    for name in NAMES:
        write_video(tmp_path / name, 6)
    harm(tmp_path / "train" / "b.mp4")
    loader = Loader(items(tmp_path), batch_size=4, seed=0)
    assert [batch.size for batch in loader] == [4]
    assert list(loader.bad) == ["train/b.mp4"]
    assert reason in loader.bad["train/b.mp4"]


def test_a_broken_image_is_a_bad_item(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n no more")
    with pytest.raises(BadItem, match="cannot be read"):
        items(tmp_path, frames=1).load(0, keyed(0))


@pytest.mark.parametrize(
    "root, problem",
    [(None, "data.root=null: set data.root=FOLDER"), ("missing", "missing: no such folder")],
)
def test_a_missing_folder_is_an_error_with_the_fix(tmp_path, root, problem):
    with pytest.raises(DataError, match=problem):
        VideoFolder(replace(CONFIG, root=root and str(tmp_path / root))).split("train")


def test_a_folder_without_videos_is_an_error_with_the_excluded_files(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"0 usable in all, 1 images, because data.frames=3; add files"
    ):
        items(tmp_path)


# --- names and the split --------------------------------------------------------------------------

ODD = [
    "with space, comma.mp4",
    "new\nline.mp4",
    "%03d.mp4",
    "concat:a|b.mp4",
    "-i.mp4",
    "\u00e4 \u2603.mp4",
]


def test_unusual_names_and_links_work(tmp_path):
    root = tmp_path / "root"
    captioned(root / "train", ODD)
    with open(os.fsencode(root / "train") + b"/\xff.mp4", "wb") as file:
        file.write((root / "train" / ODD[0]).read_bytes())
    captioned(tmp_path / "elsewhere", ["linked.mp4"])
    (root / "val").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    link = tmp_path / "link"
    link.symlink_to(root, target_is_directory=True)
    files = with_captions(link, missing_caption="empty")
    (batch,) = batches(files, 10)
    assert batch.size == len(ODD) + 1 and not batch.bad
    assert all(name.isprintable() for name in batch.ids)
    assert sorted(batch.captions) == ["", *(f"number {i}" for i in range(len(ODD)))]
    assert with_captions(link, "val").load(0, keyed(0))["caption"] == "number 0"


def test_a_link_cycle_ends(folder):
    (folder / "train" / "again").symlink_to(folder, target_is_directory=True)
    assert split_of(folder) == {"train": {"train/a.mp4"}, "val": {"val/b.mp4"}}


def many(root: Path, count: int) -> None:
    for i in range(count):
        (root / f"{i}.mp4").touch()


def test_adding_files_does_not_move_others_between_splits(tmp_path):
    many(tmp_path, 100)
    before = split_of(tmp_path, val_fraction=0.2)
    assert not before["train"] & before["val"]
    assert len(before["train"] | before["val"]) == 100
    assert 8 <= len(before["val"]) <= 32  # 20, three standard deviations of 4
    many(tmp_path, 150)
    after = split_of(tmp_path, val_fraction=0.2)
    assert before["train"] <= after["train"] and before["val"] <= after["val"]


@pytest.mark.parametrize("fraction", [0.001, 0.9])
def test_both_splits_of_a_small_folder_have_a_file(tmp_path, fraction):
    many(tmp_path, 2)
    found = split_of(tmp_path, val_fraction=fraction)
    assert len(found["train"]) == len(found["val"]) == 1


def test_a_single_file_is_in_both_splits_which_is_said(tmp_path, caplog):
    write_video(tmp_path / f"{tmp_path.name}.mp4", 3)
    one = {f"{tmp_path.name}.mp4"}
    assert split_of(tmp_path) == {"train": one, "val": one}
    assert caplog.text.count("used for training and for validation") == 1


def test_a_file_with_two_names_is_in_one_split(folder):
    (folder / "val" / "same.mp4").symlink_to(folder / "train" / "a.mp4")
    os.link(folder / "train" / "a.mp4", folder / "val" / "hard.mp4")
    assert split_of(folder) == {"train": {"train/a.mp4"}, "val": {"val/b.mp4"}}


def test_a_train_folder_without_val_is_split_by_name(tmp_path):
    for i in range(4):
        write_video(tmp_path / "train" / f"{i}.mp4", 1)
    found = split_of(tmp_path)
    assert len(found["train"]) + len(found["val"]) == 4 and found["val"]


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 0},
        {"start": "end"},
        {"crop": "left"},
        {"captions": "json"},
        {"missing_caption": "guess"},
        {"val_fraction": 0.0},
        {"val_fraction": float("nan")},
        {"num_prompts": -1},
        {"frames": 0},
    ],
)
def test_a_bad_setting_is_one_problem_that_starts_with_its_name(settings):
    problems = list(replace(CONFIG, **settings).problems())
    assert len(problems) == 1 and problems[0].startswith(next(iter(settings)))
