"""Tar shards: contents, splits, buckets, order on many processes, damage."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plugins._blocks.tar_shards import digest_of
from plugins._blocks.video_io import CONTAINERS, IMAGES
from plugins.data.webdataset import MEDIA, WebDataset
from sandbox.contracts import BadItem, Clip, DataError, StorageError
from sandbox.data.loader import Loader, batches
from sandbox.data.randomness import keyed
from sandbox.pipelines.prepare_outputs import write_shards
from tests.bad_files import DAMAGES
from tests.plugins.data.test_video_folder import levels, write_video

CONFIG = WebDataset.Config(frames=1, height=16, width=16)
Payloads = Mapping[str, bytes]


def png(level: int, height: int = 16, width: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 8 * level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def pairs(numbers: range) -> Payloads:
    """Image i has grey level i, and the caption "number i"."""
    return {f"{i:03}.png": png(i % 32) for i in numbers} | {
        f"{i:03}.txt": f" number\n {i} ".encode() for i in numbers
    }


def shard(path: Path, payloads: Payloads) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, payload in payloads.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return path


def source(root: Path, **settings) -> WebDataset:
    cache = str(root.parent / f"{root.name} indices")
    return WebDataset(replace(CONFIG, root=str(root), **{"index": cache, **settings}))


def ids(items) -> list[str]:
    return [items.id(i) for i in range(len(items))]


def split_of(root: Path, **settings) -> dict[str, set[str]]:
    data = source(root, **settings)
    return {name: set(ids(data.split(name))) for name in ("train", "val")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """24 training samples in three shards, and four validation samples."""
    folder = tmp_path / "shards"
    for number in range(3):
        numbers = range(8 * number, 8 * number + 8)
        shard(folder / f"train-{number:05}.tar", pairs(numbers))
    shard(folder / "val-00000.tar", pairs(range(24, 28)))
    return folder


# --- contents -------------------------------------------------------------------------------------


def test_media_extensions_equal_those_of_the_readers():
    assert {f".{ending}" for ending in MEDIA} == {*CONTAINERS, *IMAGES}


def test_shards_of_the_webdataset_library_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_video(tmp_path / "clip.mp4", 6)
    clip = (tmp_path / "clip.mp4").read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    for split in ("train", "val"):
        with webdataset.TarWriter(str(folder / f"{split}-0.tar")) as writer:
            writer.write({"__key__": "a/one", "mp4": clip, "json": {"text": f"of {split}"}})
    data = source(folder, frames=3, start="centre", caption="json", caption_field="text")
    sample = data.split("train").load(0, keyed(0))
    assert levels(sample["video"]) == [1, 2, 3]
    assert (sample["caption"], sample["fps"], sample["frame_stride"]) == ("of train", 10, 1)
    assert data.prompts() == ["of val"]


def test_images_and_captions_match_for_any_order_of_members(tmp_path):
    payloads = pairs(range(20))
    mixed = {name: payloads[name] for name in sorted(payloads, key=lambda n: (n[2], n[4], n))}
    shard(tmp_path / "s" / "train.tar", mixed)
    shard(tmp_path / "s" / "val.tar", pairs(range(1)))
    (full,) = batches(source(tmp_path / "s").split("train"), 20)
    shown = [levels(video)[0] for video in full.video]
    assert full.captions == [f"number {n}" for n in shown] and len({*shown}) == 20


def test_settings_select_members_by_extension(tmp_path):
    payloads = {"a.big.PNG": png(1), "a.png": png(2), "a.caption.txt": b"yes", "a.txt": b""}
    for split in ("train", "val"):
        shard(tmp_path / "s" / f"{split}.tar", payloads)
    data = source(tmp_path / "s", media=("big.png", "png"), caption="caption.txt")
    sample = data.split("train").load(0, keyed(0))
    assert (levels(sample["video"]), sample["caption"]) == ([1], "yes")
    assert "caption" not in source(tmp_path / "s", caption=None).split("val").load(0, keyed(0))


@pytest.mark.parametrize("text", [None, b" \n", b"\xff\xfe\xfa"])
def test_a_sample_without_a_usable_caption_is_a_bad_item(tmp_path, text):
    payloads = {"a.png": png(1)} | ({} if text is None else {"a.txt": text})
    for split in ("train", "val"):
        shard(tmp_path / "s" / f"{split}.tar", payloads)
    with pytest.raises(BadItem, match=r"caption .*\.txt"):
        source(tmp_path / "s").split("train").load(0, keyed(0))
    if text is None:
        data = source(tmp_path / "s", missing_caption="empty")
        assert data.split("train").load(0, keyed(0))["caption"] == ""


def test_the_content_hash_depends_only_on_members_that_are_read(root):
    before = source(root).split("val").content(0)
    payloads = dict(pairs(range(24, 28)))
    shard(root / "val-00000.tar", {"024.cls": b"7"} | payloads)
    assert source(root).split("val").content(0) == before
    shard(root / "val-00000.tar", payloads | {"024.txt": b"other"})
    assert source(root).split("val").content(0) != before


# --- order ----------------------------------------------------------------------------------------


def epoch(root: Path, rank: int, world: int, workers: int, stop: int | None = None):
    """Ids of a rank's first micro-batches of an epoch, and its loader's state."""
    items = source(root).split("train")
    loader = Loader(items, 2, 5, rank=rank, world=world, num_workers=workers)
    try:
        seen = [name for batch in islice(loader, stop) for name in batch.ids]
        return seen, loader.state_dict()
    finally:
        loader.close()


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 5), (2, 0), (2, 2), (3, 0), (4, 0), (8, 0)])
def test_an_epoch_has_every_sample_once_for_any_number_of_ranks_and_workers(root, world, workers):
    """Also with more ranks and workers than shards."""
    seen = [name for rank in range(world) for name in epoch(root, rank, world, workers)[0]]
    assert sorted(seen) == sorted(ids(source(root).split("train"))) and len(seen) == 24


@pytest.mark.parametrize("world", [5, 7])
def test_samples_that_do_not_divide_by_the_ranks_are_dropped(root, world):
    seen = [name for rank in range(world) for name in epoch(root, rank, world, 0)[0]]
    assert len(seen) == len({*seen}) == 24 - 24 % world


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_continues_where_it_stopped(root, workers):
    full, _ = epoch(root, 1, 2, 0)
    begun, state = epoch(root, 1, 2, workers, stop=2)
    items = source(root).split("train")
    loader = Loader(items, 2, 5, rank=1, world=2, num_workers=workers)
    loader.load_state_dict(state)
    rest = [name for batch in loader for name in batch.ids]
    loader.close()
    assert len(begun) == 4 and begun + rest == full


def other_key(file: Path) -> None:
    """Valid JSON of another sample."""
    file.write_text(file.read_text().replace('"key": "0', '"key": "1'))


# --- indices --------------------------------------------------------------------------------------


def test_an_index_is_cached_for_each_state_of_a_shard(root):
    before = split_of(root)
    cache = root.parent / "shards indices"
    made = sorted(cache.iterdir())
    assert len(made) == 4
    for file in made:  # the cached index is used
        rows = json.loads(file.read_text().replace('"key": "0', '"key": "kept 0'))["rows"]
        file.write_text(json.dumps({"sha256": digest_of(rows), "rows": rows}))
    assert all("kept" in name for name in split_of(root)["train"])
    for path in root.iterdir():
        shard(path, {f"new {name}": p for name, p in pairs(range(4)).items()})
    assert all("new" in name for name in split_of(root)["train"])
    assert before["train"] and len([*cache.iterdir()]) == 8


@pytest.mark.parametrize("damage", [*DAMAGES, lambda p: p.write_text("[{"), other_key])
def test_a_damaged_index_is_made_again(root, damage, caplog):
    before = split_of(root)
    made = sorted((root.parent / "shards indices").iterdir())
    content = [file.read_bytes() for file in made]
    for file in made:
        damage(file)
    assert split_of(root) == before
    assert caplog.text.count("scanned again: its index") == 4
    assert [file.read_bytes() for file in made] == content


def test_an_unwritable_cache_is_an_error_with_the_fix(root):
    (root.parent / "file").touch()
    with pytest.raises(StorageError, match=r"data\.index=.*want a writable folder"):
        split_of(root, index=str(root.parent / "file"))


@pytest.mark.parametrize("is_home_writable", [True, False])
def test_the_default_cache_needs_no_writable_current_folder(root, monkeypatch, is_home_writable):
    monkeypatch.chdir("/proc")
    monkeypatch.setenv("TMPDIR", str(root.parent / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (root.parent / "temporary").mkdir()
    user = root.parent / "user" if is_home_writable else Path("/proc/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(user))
    before = split_of(root, index=CONFIG.index)
    place = user if is_home_writable else root.parent / "temporary"
    assert len([*place.rglob("webdataset/*.json")]) == 4
    assert split_of(root, index=CONFIG.index) == before


# --- shards that were replaced --------------------------------------------------------------------


def swapped(payloads: dict[str, bytes], one: str, other: str) -> dict[str, bytes]:
    """The same members, two of them in the other's place."""
    order = {one: other, other: one}
    return {(new := order.get(name, name)): payloads[new] for name in payloads}


REPLACED = {
    "first captions": lambda p: swapped(p, "000.txt", "001.txt"),
    "middle captions": lambda p: swapped(p, "003.txt", "004.txt"),
    "last captions": lambda p: swapped(p, "006.txt", "007.txt"),
    "images": lambda p: swapped(p, "002.png", "005.png"),
    "all captions": lambda p: dict([*[*p.items()][:8], *reversed([*p.items()][8:])]),
    "other keys": lambda p: {f"1{name[1:]}": payload for name, payload in p.items()},
    "another extension": lambda p: {n.replace("3.txt", "3.cap"): x for n, x in p.items()},
    "other contents": lambda p: {n: x.replace(b"number", b"figure") for n, x in p.items()},
    "other sizes": lambda p: {n: x[:-1] if n == "003.txt" else x for n, x in p.items()},
}


def replace_with(path: Path, payloads: Payloads) -> None:
    """A shard of the same size and times."""
    stat = path.stat()
    shard(path, payloads)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", REPLACED)
@pytest.mark.parametrize("is_open", [False, True])
def test_a_shard_that_was_replaced_is_noticed(tmp_path, name, is_open):
    """By its headers: whatever its size and times, no image gets the caption of another."""
    root, payloads = tmp_path / "shards", dict(pairs(range(8)))
    path = shard(root / "train-0.tar", payloads)
    shard(root / "val-0.tar", pairs(range(24, 26)))
    cfg = {"missing_caption": "empty"}
    items = source(root, **cfg).split("train")
    new = REPLACED[name](payloads)
    replace_with(path, new)
    for _ in range(2):  # an error only once
        try:
            items = items if is_open else source(root, **cfg).split("train")
            found = {items.id(i)[-3:]: items.load(i, keyed(0)) for i in range(len(items))}
            break
        except DataError as e:
            assert "run the command again" in str(e)
            is_open = False
    else:
        raise AssertionError("refused twice")
    expected = {n[:-4]: " ".join(x.decode().split()) for n, x in new.items() if n.endswith("txt")}
    assert {key: s["caption"] for key, s in found.items() if s["caption"]} == expected
    assert {k: int(s["video"].add(1).mul(127.5).mean().round() // 8) for k, s in found.items()} == {
        k: int(k[1:]) for k in found
    }


def test_prepared_shards_that_were_replaced_are_refused(prepared):
    paths = sorted(prepared.glob("train-*.tar"))
    stat, whole = paths[0].stat(), paths[0].read_bytes()
    items = source(prepared, frames=4).split("train")
    items.load(0, keyed(0))
    paths[0].write_bytes(whole.replace(b"id0.txt", b"id9.txt"))
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"is not the shard of index\.json: copy it again"):
        items.load(0, keyed(0))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Shards of task=prepare: three training clips (one with nine frames), one for validation."""
    folder, splits = tmp_path / "prepared", {"train": [], "val": []}
    folder.mkdir()
    for i, (frames, height) in enumerate([(4, 24), (4, 16), (9, 24), (4, 16)]):
        file = tmp_path / f"{i}.mp4"
        write_video(file, frames, first=4 * i, height=height)
        clip = {"frames": frames, "height": height, "width": 16, "fps": 10.0}
        row = {"id": f"id{i}", "file": file, "caption": f"clip {i}", "scores": {}, "source": "x"}
        row |= {"start": 0.0, "end": 1.0, "clip": clip | {"bytes": file.stat().st_size}}
        splits["val" if i == 3 else "train"].append(row)
    write_shards(folder, splits, 4096)
    return folder


def test_the_index_of_prepared_shards_is_used_and_no_other_is_made(prepared):
    assert len([*prepared.glob("train-*.tar")]) > 1
    data = source(prepared, frames=4)
    samples = [*batches(data.split("train"), 3)]
    found = zip(samples[0].captions, samples[0].video, strict=True)
    assert {caption: levels(video)[0] // 4 for caption, video in found} == {
        "clip 0": 0, "clip 1": 1, "clip 2": 2,
    }  # fmt: skip
    assert data.prompts() == ["clip 3"]
    assert not (prepared.parent / "prepared indices").exists()


def changed(index: dict, entry: dict, harm: str) -> None:
    if harm == "format":
        index["format"] = 99
    elif harm == "outside":
        entry["samples"][0]["members"]["mp4"] = [0, 10**9]
    elif harm == "missing":
        entry["file"] = "train-00099.tar"
    elif harm == "elsewhere":
        entry["file"] = "../0.mp4"
        entry["bytes"] = 1
    else:
        entry["bytes"] += 1


@pytest.mark.parametrize(
    "harm, problem",
    [
        ("format", "its format is 99, want 1"),
        ("outside", r"index.json is damaged .*'id0' is at 0"),
        ("missing", "train-00099.tar is not there"),
        ("elsewhere", "copy it again"),
        ("bytes", r"train-00000.tar has \d+ bytes, want \d+ from index.json"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_an_error(prepared, harm, problem):
    path = prepared / "index.json"
    index = json.loads(path.read_text())
    changed(index, index["splits"]["train"][0], harm)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=problem):
        split_of(prepared, frames=4)


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_indexed", [True, False])
def test_clips_take_the_bucket_of_their_frames_and_shape(prepared, is_indexed):
    if not is_indexed:
        (prepared / "index.json").unlink()
    settings = {"frames": 4, "buckets": ("4x24x16", "9x24x16"), "stride": 1}
    items = source(prepared, **settings).split("train")
    sizes = {ids(items)[i][-3:]: items.bucket(i, keyed(i)) for i in range(3)}
    assert sizes == {
        "id0": Clip(3, 4, 24, 16),
        "id1": Clip(3, 4, 16, 16),
        "id2": Clip(3, 9, 24, 16),
    }
    loader = Loader(items, 1, 0)
    assert {tuple(b.video.shape[1:]) for b in loader} == {
        (3, 4, 24, 16), (3, 4, 16, 16), (3, 9, 24, 16),
    }  # fmt: skip
    assert source(prepared, **settings | {"stride": 2}).split("train").bucket(2, keyed(0)) == Clip(
        3, 4, 24, 16
    )


def test_images_and_videos_train_together_with_a_one_frame_bucket(tmp_path, caplog):
    write_video(tmp_path / "a.mp4", 4)
    payloads = {"a.mp4": (tmp_path / "a.mp4").read_bytes(), "b.png": png(3), "c.png": b"no"}
    for split in ("train", "val"):
        shard(tmp_path / "s" / f"{split}.tar", payloads)
    both = source(tmp_path / "s", frames=4, caption=None, buckets=("1x16x16",))
    assert both.cfg.provides() == {"video"}
    found = [*batches(both.split("train"), 4)]
    assert sorted(tuple(b.video.shape) for b in found) == [(1, 3, 1, 16, 16), (1, 3, 4, 16, 16)]
    assert [line for b in found for line in b.bad if "cannot be read" in line]
    assert len(source(tmp_path / "s", frames=4, caption=None).split("train")) == 1
    assert "4 images, because no clip has one frame" in caplog.text


# --- the split ------------------------------------------------------------------------------------


def test_names_of_shards_or_folders_define_the_splits(root):
    found = split_of(root)
    assert {k: len(v) for k, v in found.items()} == {"train": 24, "val": 4}
    for old in [*root.iterdir()]:
        split, _, number = old.name.partition("-")
        (root / split).mkdir(exist_ok=True)
        old.rename(root / split / number)
    assert {k: len(v) for k, v in split_of(root).items()} == {"train": 24, "val": 4}
    shard(root / "test-0.tar", pairs(range(3)))
    assert {k: len(v) for k, v in split_of(root).items()} == {"train": 24, "val": 4}


def test_split_by_shard_holds_out_entire_shards(root):
    found = split_of(root, split_by="shard", val_fraction=0.5)
    by_shard = [{name.partition("/")[0] for name in side} for side in found.values()]
    assert not by_shard[0] & by_shard[1] and len(by_shard[0] | by_shard[1]) == 4


def test_a_key_is_in_one_split_and_stays_when_shards_are_added(root):
    for number in (3, 4):
        shard(root / f"train-{number:05}.tar", pairs(range(8)))
    before = split_of(root, split_by="key", val_fraction=0.3)
    keys = {name: {i.rpartition("/")[2] for i in found} for name, found in before.items()}
    assert not keys["train"] & keys["val"] and len(keys["train"] | keys["val"]) == 28
    assert len(before["train"] | before["val"]) == 28 + 16
    shard(root / "train-00005.tar", pairs(range(100, 150)))
    after = split_of(root, split_by="key", val_fraction=0.3)
    assert before["train"] <= after["train"] and before["val"] <= after["val"]


def test_one_shard_cannot_be_split_by_shard(tmp_path):
    shard(tmp_path / "s" / "0.tar", pairs(range(40)))
    with pytest.raises(DataError, match=r"no sample for 'val' .*data\.split_by=key"):
        split_of(tmp_path / "s", split_by="shard")
    assert split_of(tmp_path / "s")["val"]


# --- untrusted and damaged shards -----------------------------------------------------------------


def test_paths_links_and_pickles_in_a_shard_have_no_effect(tmp_path):
    folder = tmp_path / "shards"
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(9))
    evil = b"cposix\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    endings = ("pyd", "pkl", "pickle", "pth", "pt", "npy")
    payloads = {"../../up.png": png(1), "/root.png": png(2), "pipe:touch x.png": png(3)}
    payloads |= {f"../../up.{ending}": evil for ending in endings} | {".hidden": b"", "bare": b""}
    for split in ("train", "val"):
        shard(folder / f"{split}.tar", payloads)
        with tarfile.open(folder / f"{split}.tar", "a") as tar:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
                member = tarfile.TarInfo(f"link{kind.decode()}.png")
                member.type, member.linkname = kind, str(outside)
                tar.addfile(member)
    before = set(tmp_path.rglob("*"))
    data = source(folder, caption=None)
    found = [*batches(data.split("train"), 9)]
    assert [levels(v) for v in found[0].video] == [[1], [2], [3]] and not found[0].bad
    made = set(tmp_path.rglob("*")) - before
    assert {p.parent for p in made} == {tmp_path, tmp_path / "shards indices"} and len(made) == 3


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 512 * 9 + 100])


def damage_header(path: Path) -> None:
    full = bytearray(path.read_bytes())
    full[1024 + 148 : 1024 + 156] = b"\xff" * 8  # the checksum of the second member
    path.write_bytes(full)


def compress(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


def repeat_member(path: Path) -> None:
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("000.txt"))


@pytest.mark.parametrize(
    "harm, problem",
    [
        (cut_short, "cannot be read"),
        (damage_header, "is damaged at byte 1024"),
        (compress, "want a complete, uncompressed tar file"),
        (repeat_member, "has two members '000.txt'"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
    ],
    ids=["cut", "header", "gzip", "repeat_member", "empty"],
)
def test_a_damaged_shard_is_an_error(root, harm, problem):
    harm(root / "train-00000.tar")
    with pytest.raises(DataError, match=rf"train-00000\.tar {problem}|{problem}"):
        split_of(root)


def test_a_damaged_member_is_a_bad_item(root):
    items = source(root).split("train")
    member = items.entries[0].member("png")
    with (root / "train-00000.tar").open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    loader = Loader(items, 4, 0)
    assert sum(batch.size for batch in loader) == 24  # another sample replaces it
    assert [*loader.bad] == ["train-00000.tar/000"]
    (root / "train-00000.tar").write_bytes(b"")
    with pytest.raises(BadItem, match=r"train-00000\.tar ends before byte"):
        items.load(1, keyed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"media": ()},
        {"media": ("pkl",)},
        {"missing_caption": "guess"},
        {"split_by": "name"},
        {"val_fraction": 0.0},
        {"stride": 0},
        {"start": "end"},
        {"crop": "left"},
        {"num_prompts": -1},
        {"buckets": ("9x16",)},
    ],
)
def test_a_bad_setting_is_one_problem_that_starts_with_its_name(settings):
    problems = list(replace(CONFIG, **settings).problems())
    assert len(problems) == 1 and problems[0].startswith(next(iter(settings)))
