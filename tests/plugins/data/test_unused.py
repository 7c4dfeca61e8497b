"""Nothing in a data folder vanishes: other containers, captions, paths, files that are not read."""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plugins._blocks import tar_shards
from plugins._blocks.folders import print_once
from plugins.data.celebahq import CelebAHQ
from plugins.data.cogvideox_folder import CogVideoXFolder
from plugins.data.easyanimate_json import EasyAnimateJSON
from plugins.data.video_folder import VideoFolder
from plugins.data.webdataset import WebDataset
from plugins.data.webvid import WebVid
from sandbox.contracts import BadItem, Clip, DataError
from sandbox.data.loader import batches
from sandbox.data.randomness import keyed
from tests.odd_videos import encode, number, trimmed

SIZE = {"frames": 3, "height": 48, "width": 64}
CODECS = {".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "libx264",
          ".avi": "mpeg4", ".webm": "libvpx-vp9", ".gif": "gif"}  # fmt: skip


def clip(path: Path, count: int = 6, first: int = 0) -> Path:
    codec = CODECS[path.suffix.lower()]
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    encode(path, count=count, first=first, codec=codec, pixels=pixels, options={})
    return path


def folder_items(root: Path, split: str = "train", **settings):
    return VideoFolder(VideoFolder.Config(root=str(root), **SIZE, **settings)).split(split)


def captions(root: Path, *names: str, **settings) -> list[str]:
    """Captions of clips in train/, in the order of their names."""
    for i, name in enumerate(names):
        clip(root / name, 3, i)
    (root / "val").mkdir(exist_ok=True)
    clip(root / "val" / "v.mp4", 3)
    items = folder_items(root, **settings)
    return [items.load(i, keyed(0))["caption"] for i in range(len(items))]


# --- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*CODECS, ".MOV", ".Mkv"])
def test_a_folder_of_one_container_trains(tmp_path, ending):
    for i in range(3):
        clip(tmp_path / "train" / f"{i}{ending.lower()}", first=i).rename(
            tmp_path / "train" / f"{i}{ending}"
        )
    clip(tmp_path / "val" / "v.mp4")
    items = folder_items(tmp_path, captions="none", start="centre")
    (batch,) = batches(items, 4)
    assert batch.size == 3 and not batch.bad and not items.excluded
    frames = ((batch.video[:, :, 0].permute(0, 2, 3, 1) + 1) * 127.5).numpy()
    assert [number(x) for x in frames] == [1, 2, 3]


def test_list_formats_read_every_container(tmp_path):
    names = [f"a{ending}" for ending in CODECS] + ["b.mp4"]
    for name in names:
        clip(tmp_path / name)
    write_lists(tmp_path, names, ["a cat"] * len(names))
    write_metadata(tmp_path, names)
    size = dict(SIZE, height=64) | {"frames": 3}
    for source in (
        CogVideoXFolder(CogVideoXFolder.Config(root=str(tmp_path), **SIZE)),
        EasyAnimateJSON(EasyAnimateJSON.Config(root=str(tmp_path), **size, frame_interval=3)),
    ):
        found = [source.split(split) for split in ("train", "val")]
        assert sum(map(len, found)) == len(names)
        assert not any(b.bad for items in found for b in batches(items, 8))


def write_lists(root: Path, videos: list[str], prompts: list[str]) -> None:
    (root / "videos.txt").write_text("\n".join(videos) + "\n")
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")


def write_metadata(root: Path, names: list[str]) -> None:
    rows = [{"file_path": name, "text": "a cat", "type": "video"} for name in names]
    (root / "metadata.json").write_text(json.dumps(rows))


# --- captions -------------------------------------------------------------------------------------


def text(ending: str) -> Callable[[Path], None]:
    return lambda root: [
        (root / "train" / f"{i}{ending}").write_text(f"caption {i}") for i in range(2)
    ]


def table(name: str, columns: str, place: Callable[[int, Path], str]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        with (root / name).open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(columns.split(","))
            lines.writerows([place(i, root), f"caption {i}"] for i in range(2))

    return write


def json_rows(name: str, file: str, key: str, place: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(
        "".join(json.dumps({file: place.format(i), key: f"caption {i}"}) + "\n" for i in range(2))
    )


def relative(i: int, root: Path) -> str:
    return f"train/{i}.mp4"


CAPTIONS = {
    "txt": text(".txt"),
    "caption": text(".caption"),
    "mp4.txt": text(".mp4.txt"),
    "mp4.caption": text(".mp4.caption"),
    "captions.csv": table("captions.csv", "file,caption", relative),
    "captions.csv with other columns": table("captions.csv", "file_name,text", relative),
    "absolute paths": table("captions.csv", "file,caption", lambda i, r: f"{r}/train/{i}.mp4"),
    "metadata.csv": table("metadata.csv", "file_name,text", relative),
    "metadata.csv, absolute": table(
        "metadata.csv", "file_path,prompt", lambda i, r: f"{r}/train/{i}.mp4"
    ),
    "metadata.csv of the split": table(
        "train/metadata.csv", "file_name,caption", lambda i, r: f"{i}.mp4"
    ),
    "metadata.jsonl": json_rows("metadata.jsonl", "file_name", "text", "train/{}.mp4"),
    "metadata.jsonl of the split": json_rows(
        "train/metadata.jsonl", "file_name", "text", "./{}.mp4"
    ),
    "metadata.jsonl, video": json_rows("metadata.jsonl", "video", "caption", "train/{}.mp4"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_common_places_of_captions_are_read(tmp_path, name, caplog):
    (tmp_path / "train").mkdir()
    CAPTIONS[name](tmp_path)
    assert captions(tmp_path, "train/0.mp4", "train/1.mp4") == ["caption 0", "caption 1"]
    assert "excluded" not in caplog.text


def test_a_link_to_the_folder_and_its_absolute_paths_fit(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "train").mkdir(parents=True)
    link.symlink_to(real, target_is_directory=True)
    table("captions.csv", "file,caption", lambda i, r: f"{real}/train/{i}.mp4")(real)
    assert captions(link, "train/0.mp4", "train/1.mp4") == ["caption 0", "caption 1"]


def test_accents_and_backslashes_of_tables_fit(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "captions.csv").write_text(
        "file,caption\ntrain/caf\u00e9.mp4,one\ntrain\\b.mp4,two\n", encoding="utf-8"
    )
    assert captions(tmp_path, "train/cafe\u0301.mp4", "train/b.mp4") == ["two", "one"]


def test_earlier_places_win(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("captions.csv", "metadata.csv"):
        (tmp_path / name).write_text(f"file,caption\ntrain/0.mp4,of {name}\n")
    (tmp_path / "train" / "1.txt").write_text("of txt")
    (tmp_path / "train" / "1.caption").write_text("of caption")
    (tmp_path / "metadata.csv").write_text("file,caption\ntrain/0.mp4,m\ntrain/1.mp4,m\n")
    assert captions(tmp_path, "train/0.mp4", "train/1.mp4") == ["of captions.csv", "of txt"]


@pytest.mark.parametrize("content", ["{", "[1]\n", '{"file_name": "a"', "\xff"])
def test_metadata_that_is_broken_is_named_and_not_used(tmp_path, content, caplog):
    (tmp_path / "train").mkdir()
    (tmp_path / "metadata.jsonl").write_text(content, encoding="latin-1")
    text(".txt")(tmp_path)
    assert captions(tmp_path, "train/0.mp4", "train/1.mp4") == ["caption 0", "caption 1"]
    assert "metadata.jsonl is not used" in caplog.text


def test_a_caption_of_a_gigabyte_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "train").mkdir()
    with (tmp_path / "train" / "0.txt").open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadItem, match=r"0\.txt has more than 1048576 bytes"):
        captions(tmp_path, "train/0.mp4")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# --- what is not used -----------------------------------------------------------------------------

OTHERS = ["a.wmv", "b.HEIC", "c.jp2", "d.ts", "sub/e.mpg", "README", "f.srt", "g.png"]


def test_every_other_file_is_counted_by_reason(tmp_path, caplog):
    clip(tmp_path / "train" / "0.mp4")
    clip(tmp_path / "val" / "0.mp4")
    for name in [*OTHERS, "h.wmv", ".hidden", "alone.txt", "train/0.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a cat")
    assert dict(folder_items(tmp_path).excluded) == {
        ".wmv files, which are not read": 2, ".heic files, which are not read": 1,
        ".jp2 files, which are not read": 1, ".ts files, which are not read": 1,
        ".mpg files, which are not read": 1, ".srt files, which are not read": 1,
        "files without an extension": 1, "images, because data.frames=3": 1,
        "text files without a clip of their name": 1,
    }  # fmt: skip
    assert "excluded, 2 .wmv files, which are not read, 1 " in caplog.text


def test_a_folder_without_a_usable_file_names_what_is_there(tmp_path):
    for name in OTHERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"0 usable in all.*\.heic files, which are not read") as e:
        folder_items(tmp_path)
    assert "add files (.mp4, .m4v, .mov" in str(e.value)


def test_clips_outside_of_the_folders_of_splits_are_counted(tmp_path, caplog):
    for name in ("train/0.mp4", "val/0.mp4", "test/0.mp4", "1.mp4"):
        clip(tmp_path / name)
        Image.new("RGB", (8, 8)).save((tmp_path / name).with_suffix(".png"))
    found = folder_items(tmp_path, captions="none").excluded
    assert found["clips outside train/ and val/"] == 2
    CelebAHQ(CelebAHQ.Config(root=str(tmp_path))).split("train")
    assert "2 images outside train/ and val/" in caplog.text


def test_captions_that_are_not_wanted_are_counted(tmp_path):
    for i in range(2):
        clip(tmp_path / f"{i}.mp4")
        (tmp_path / f"{i}.txt").write_text("a cat")
    found = folder_items(tmp_path, captions="none").excluded
    assert found == {"captions, because data.captions=none": 2}


def test_files_that_no_list_names_are_counted(tmp_path, caplog):
    videos = [f"videos/{i}.mp4" for i in range(4)]
    for name in [*videos, "videos/more.mov", "videos/more.mkv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        clip(tmp_path / name)
    write_lists(tmp_path, videos, ["a cat"] * 4)
    write_metadata(tmp_path, videos)
    rows = [f"{i},all,a cat" for i in range(3)] + ["4,all,"]
    (tmp_path / "metadata.csv").write_text("\n".join(["videoid,page_dir,name", *rows]))
    size = SIZE | {"height": 64}
    for plugin, words in (
        (CogVideoXFolder(CogVideoXFolder.Config(root=str(tmp_path), **SIZE)), "2 files that no"),
        (EasyAnimateJSON(EasyAnimateJSON.Config(root=str(tmp_path), **size, frame_interval=3)),
         "2 files that no"),
        (WebVid(WebVid.Config(root=str(tmp_path), **SIZE)), "1 rows of metadata.csv with an empty"),
    ):  # fmt: skip
        caplog.clear()
        print_once.cache_clear()
        plugin.split("train")
        plugin.split("val")
        assert caplog.text.count("excluded") == 1 and words in caplog.text


def test_absolute_paths_in_lists_fit(tmp_path):
    names = [f"{i}.mp4" for i in range(3)]
    for name in names:
        clip(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(f"{tmp_path}/{n}" for n in names))
    write_lists(tmp_path, [f"{tmp_path}/{n}" for n in names], ["a cat"] * 3)
    rows = CogVideoXFolder(CogVideoXFolder.Config(root=str(tmp_path), **SIZE)).split("train").rows
    assert {row.video for row in rows} <= {*names}
    write_metadata(tmp_path, [f"{tmp_path}/{n}" for n in names])
    cfg = EasyAnimateJSON.Config(root=str(tmp_path), **(SIZE | {"height": 64}), frame_interval=3)
    assert len(EasyAnimateJSON(cfg).split("train")) == 2


def test_images_that_are_not_read_are_counted(tmp_path, caplog):
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    for name in ("a.heic", "b.jp2", "c.mp4"):
        (tmp_path / name).touch()
    CelebAHQ(CelebAHQ.Config(root=str(tmp_path))).split("train")
    assert "1 .heic files, which are not read" in caplog.text


# --- shards ---------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes | int]) -> None:
    """Members of these bytes, or of so many zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = content if isinstance(content, int) else len(content)
            if isinstance(content, bytes):
                tar.addfile(member, io.BytesIO(content))
                continue
            tar.addfile(member, Zeros())


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return file.getvalue()


def shards(root: Path, **settings) -> WebDataset:
    size = {"frames": 1, "height": 16, "width": 16, "index": str(root / ".indices")}
    return WebDataset(WebDataset.Config(root=str(root), **(size | settings)))


def test_keys_with_dots_are_named(tmp_path, caplog):
    content = {f"clip_v1.{i}_000.{e}": png() for i in range(3) for e in ("png", "txt")}
    shard(tmp_path / "0.tar", content | {"a.png": png(), "a.txt": b"a", "b.png": png()})
    shards(tmp_path).split("train")
    assert "3 members with a dot in their name, such as clip_v1.0_000.png" in caplog.text
    assert "read as key 'clip_v1' and extension '0_000.png'" in caplog.text


def test_samples_without_pixels_and_other_members_are_named(tmp_path, caplog):
    content = {"a.png": png(), "b.png": png(), "c.mov": b"?", "c.txt": b"c", "d.npy": b"?"}
    shard(tmp_path / "0.tar", content)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        link = tarfile.TarInfo("e.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("bare"))
    for name in ("1.tar.gz", "2.tgz", "notes.md"):
        (tmp_path / name).touch()
    shards(tmp_path).split("train")
    for words in (
        "2 samples without a member of data.media (they have .mov, .npy, .txt)",
        "1 links or special members", "1 members without an extension",
        "2 compressed shards; decompress them", "1 .md files, which are not read",
    ):  # fmt: skip
        assert words in caplog.text


@pytest.mark.parametrize("other", ["caption", "json"])
def test_another_member_with_captions_is_named(tmp_path, other):
    content = {f"{i}.{e}": png() if e == "png" else b"a" for i in range(3) for e in ("png", other)}
    shard(tmp_path / "0.tar", content)
    with pytest.raises(BadItem, match=f"data.caption={other} reads another member"):
        shards(tmp_path).split("train").load(0, keyed(0))


@pytest.mark.parametrize("name", ["huge.png", "huge.mp4", "huge.txt", "huge.json"])
def test_a_member_of_a_gigabyte_is_refused_before_it_is_read(tmp_path, name):
    content: dict[str, bytes | int] = {f"{i}.png": png() for i in range(4)}
    content |= {"0.txt": b"a", "1.txt": b"b", "2.txt": b"c", "3.txt": b"d"}
    huge = {"huge.png": png()} if name in ("huge.txt", "huge.json") else {"huge.txt": b"e"}
    huge |= {name: 1 << 30}
    sparse(tmp_path / "train-0.tar", content | huge, name)
    shard(tmp_path / "val-0.tar", {"v.png": png(), "v.txt": b"v"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = shards(tmp_path, caption="json" if name == "huge.json" else "txt",
                   missing_caption="empty").split("train")  # fmt: skip
    bad = {line for b in batches(items, 8) for line in b.bad}
    assert len(items) == 5 and len(bad) == 1
    assert "1073741824 bytes, more than" in bad.pop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def sparse(path: Path, members: dict[str, bytes | int], huge: str) -> None:
    """As `shard`, without writing the zeros of the huge member, which comes last."""
    size = members[huge]
    assert isinstance(size, int)
    shard(path, {n: c for n, c in members.items() if n != huge})
    header = tarfile.TarInfo(huge)
    header.size = size
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    with path.open("r+b") as file:
        file.seek(end)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(end + 512 + size + 1024)


def test_limits_allow_long_videos_and_large_images():
    assert 500_000_000 < tar_shards.LARGEST < 1_000_000_000


def test_one_sample_is_in_both_splits(tmp_path):
    shard(tmp_path / "0.tar", {f"{tmp_path.name}.png": png(), f"{tmp_path.name}.txt": b"a"})
    source = shards(tmp_path)
    assert [len(source.split(name)) for name in ("train", "val")] == [1, 1]


# --- buckets --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """30 frames that are shown, after others that an edit list hides."""
    path = tmp_path_factory.mktemp("cut") / "cut.mp4"
    trimmed(path)
    return path


def test_the_bucket_is_that_of_what_is_shown(cut, tmp_path):
    for i in range(2):
        shutil.copy(cut, tmp_path / f"{i}.mp4")
    write_lists(tmp_path, ["0.mp4", "1.mp4"], ["a cat"] * 2)
    write_metadata(tmp_path, ["0.mp4", "1.mp4"])
    cfg = CogVideoXFolder.Config(root=str(tmp_path), frames=45, height=48, width=64,
                                 buckets=("30x48x64", "9x48x64"), frame_stride=1)  # fmt: skip
    items = CogVideoXFolder(cfg).split("train")
    assert items.bucket(0, keyed(0)) == Clip(3, 30, 48, 64)
    frames = ((items.load(0, keyed(0))["video"].permute(1, 2, 3, 0) + 1) * 127.5).numpy()
    assert [number(x) for x in frames] == [*range(17, 47)]  # none is repeated
    cfg = EasyAnimateJSON.Config(root=str(tmp_path), frames=36, height=64, width=64,
                                 frame_interval=3)  # fmt: skip
    items = EasyAnimateJSON(cfg).split("train")
    assert items.bucket(0, keyed(0)).frames == 24  # 80 % of 30
    assert np.isfinite(items.load(0, keyed(0))["video"].numpy()).all()


def test_the_bucket_is_that_of_square_pixels(tmp_path):
    from fractions import Fraction

    for i in range(2):
        encode(tmp_path / f"{i}.mp4", height=64, width=64, aspect=Fraction(2, 1))
    write_lists(tmp_path, ["0.mp4", "1.mp4"], ["a cat"] * 2)
    cfg = CogVideoXFolder.Config(root=str(tmp_path), frames=9, height=64, width=64,
                                 buckets=("9x64x128", "9x128x64"))  # fmt: skip
    items = CogVideoXFolder(replace(cfg)).split("train")
    assert items.bucket(0, keyed(0)) == Clip(3, 9, 64, 128)
    video = items.load(0, keyed(0))["video"]
    assert video.shape == (3, 9, 64, 128)
    assert (video[:, 0, 32, :12] < -0.8).all() and (video[:, 0, 32, 20:] > -1.1).all()
