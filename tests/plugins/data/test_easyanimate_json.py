"""EasyAnimate's table of images and videos: entries, sizes, frames, splits, bad input, training."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plugins.data.easyanimate_json import EasyAnimateJSON, frame_numbers, usable_frames
from sandbox.contracts import Clip, ConfigError, DataError
from sandbox.data import Loader, batches
from sandbox.randomness import keyed
from sandbox.wiring import wire
from tests.helpers import TINY, composed, sampled, train
from tests.plugins.data.test_video_folder import levels, write_video

CONFIG = EasyAnimateJSON.Config()
SQUARE, WIDE, TALL = (16, 16), (16, 32), (32, 16)


def entry(file: str, kind: str | None = "image", **more) -> dict:
    return {"file_path": file, "text": f"shows {file}", **({"type": kind} if kind else {}), **more}


def table(root: Path, entries: list[dict], name: str = "metadata.json") -> Path:
    (root / name).write_text(json.dumps(entries))
    return root


def image(root: Path, name: str, height: int, width: int) -> dict:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (40, 80, 120)).save(root / name)
    return entry(name)


def made(root: Path, images: int = 8, videos: int = 8, frames: int = 16) -> Path:
    """Images, every second one wide, and videos of 16x16."""
    found = [image(root, f"{i}.png", *(WIDE if i % 2 else SQUARE)) for i in range(images)]
    for i in range(videos):
        write_video(root / f"{i}.mp4", frames, first=i)
        found.append(entry(f"{i}.mp4", "video"))
    return table(root, found)


def split(root: Path, name: str = "train", **settings):
    return EasyAnimateJSON(replace(CONFIG, root=str(root), **settings)).split(name)


def sizes(items, seed: int = 0, epoch: int = 0) -> dict[str, Clip]:
    ids = [items.id(i) for i in range(len(items))]
    return {n: items.bucket(i, keyed(seed, "data", epoch, n)) for i, n in enumerate(ids)}


def size(clip: Clip) -> tuple[int, int, int]:
    return clip.frames, clip.height, clip.width


# --- sizes ----------------------------------------------------------------------------------------


def test_images_and_videos_have_the_announced_bucket_sizes(tmp_path):
    items = split(made(tmp_path))
    buckets = sizes(items)
    assert {size(c) for c in buckets.values()} == {(1, *SQUARE), (1, 8, 16), (9, *SQUARE)}
    for i, name in enumerate(buckets):
        sample = items.load(i, keyed(0, "data", 0, name))
        assert Clip(*sample["video"].shape) == buckets[name]
        assert sample["caption"] == f"shows {name}"
    assert set(buckets.values()) <= set(items.cfg.clips())


@pytest.mark.parametrize(
    ("length", "frames"), [(5, 1), (11, 1), (12, 9), (22, 9), (23, 18), (40, 27), (900, 27)]
)
def test_a_video_yields_the_windows_of_four_fifths_of_its_frames(tmp_path, length, frames):
    row = {"width": 16, "height": 16, "frames": length}
    (tmp_path / "a.mp4").touch()
    table(tmp_path, [entry("a.mp4", "video", **row), entry("b.mp4", "video", **row)])
    assert {c.frames for c in sizes(split(tmp_path, frames=27)).values()} == {frames}


def test_files_with_listed_sizes_are_not_opened(tmp_path):
    (tmp_path / "a.png").touch()
    rows = [entry(f"{n}.png", width=w, height=h) for n, w, h in [("a", 640, 384), ("b", 640, 384)]]
    items = split(table(tmp_path, rows), height=512, width=512, size_multiple=16)
    assert [size(c) for c in sizes(items).values()] == [(1, 384, 640)]


def test_the_published_preset_has_the_published_sizes():
    cfg = composed("data=easyanimate_json_512").data
    assert len(cfg.clips()) == 40 * 17
    assert size(cfg.clips()[0]) == (144, 512, 512)
    assert {c.frames for c in cfg.clips()} == {1, *range(9, 145, 9)}
    assert {(c.height, c.width) for c in cfg.clips()} == {
        (c.height, c.width) for c in composed("data=easyanimate_json_512_images").data.clips()
    }
    assert not [*cfg.problems()]


def test_random_crops_depend_on_seed_epoch_and_id_in_training_only(tmp_path):
    random = {"random_ratio_crop": True, "random_frame_crop": True, "frames": 27, "height": 64,
              "width": 64}  # fmt: skip
    row = {"width": 64, "height": 64, "frames": 100}
    (tmp_path / "0.mp4").touch()
    table(tmp_path, [entry(f"{i}.mp4", "video", **row) for i in range(120)])
    items, val = (split(tmp_path, name, **random) for name in ("train", "val"))
    first, again, other = sizes(items), sizes(items), sizes(items, epoch=1)
    assert first == again != other
    assert set(first.values()) <= set(items.cfg.clips())
    assert len({(c.height, c.width) for c in first.values()}) > 4
    assert {c.frames for c in first.values()} == {1, 9, 18, 27}
    assert sum(c.frames == 27 for c in first.values()) > 0.8 * len(first)
    assert {size(c) for c in sizes(val, epoch=3).values()} == {(27, 64, 64)}


def test_without_buckets_all_clips_have_one_height_and_width(tmp_path):
    items = split(made(tmp_path), enable_bucket=False, height=8, width=24)
    assert {size(c) for c in sizes(items).values()} == {(1, 8, 24), (9, 8, 24)}
    assert set(sizes(items).values()) == set(items.cfg.clips())


def test_images_can_be_larger_than_videos(tmp_path):
    items = split(made(tmp_path), image_size=32)
    assert {size(c) for c in sizes(items).values()} == {(1, 32, 32), (1, 16, 40), (9, 16, 16)}


def test_exif_rotation_is_applied_before_the_bucket_is_chosen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (32, 16)).save(tmp_path / "b.jpg")
    root = table(tmp_path, [entry("a.jpg"), entry("b.jpg")])
    found = {k: v for name in ("train", "val") for k, v in sizes(split(root, name)).items()}
    assert {k: (v.height, v.width) for k, v in found.items()} == {
        "a.jpg": (16, 8),
        "b.jpg": (8, 16),
    }


# --- frames ---------------------------------------------------------------------------------------


def test_frames_come_from_the_published_part_of_a_video():
    assert usable_frames(100, 144) == 80
    assert frame_numbers(100, 144, 1, 0.0) == [*range(9, 89)]
    assert frame_numbers(100, 144, 1, 0.999) == [*range(10, 90)]
    assert frame_numbers(1000, 9, 1, 0.0) == [*range(90, 99)]
    assert frame_numbers(1000, 9, 1, 1 - 1e-9) == [*range(891, 900)]
    assert frame_numbers(100, 9, 100, 0.5) == np.linspace(0, 89, 9, dtype=int).tolist()
    assert frame_numbers(1, 9, 1, 0.5) == []


def test_training_clips_start_randomly_and_validation_clips_in_the_middle(tmp_path):
    root = made(tmp_path, 0, 4, 24)
    items, val = split(root), split(root, "val")
    clips = [levels(items.load(0, keyed(seed))["video"]) for seed in range(6)]
    assert all(clip == [*range(clip[0], clip[0] + 9)] for clip in clips)
    assert len({clip[0] for clip in clips}) > 2
    name = int(val.id(0)[0])
    middle = [*range(name + 7, name + 16)]  # the start is one of 2 to 12
    assert levels(val.load(0, keyed(1))["video"]) == middle


# --- entries --------------------------------------------------------------------------------------


def test_csv_and_json_give_the_same_entries(tmp_path):
    root = made(tmp_path)
    entries = json.loads((root / "metadata.json").read_text())
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_path", "text", "type", "width"])
        writer.writeheader()
        writer.writerows(entries)
    both = [split(root, meta_path=str(root / f"metadata.{kind}")) for kind in ("json", "csv")]
    assert both[0].rows == both[1].rows


def test_an_entry_without_a_type_is_an_image(tmp_path):
    image(tmp_path, "a.png", 16, 16)
    image(tmp_path, "b.png", 16, 16)
    items = split(table(tmp_path, [entry("a.png", None), entry("b.png", None)]))
    assert items.rows[0][0].kind == "image"
    table(tmp_path, [entry("a.mp4", None)])
    with pytest.raises(DataError, match=r"'a\.mp4': it has no type, so it is an 'image'"):
        split(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"file_path": "a.png"}], "entry 1: text missing or not text"),
        ([{"path": "a.png", "caption": "b"}], r"file_path and text missing.*\['caption', 'path'\]"),
        ([entry("a.png", "picture")], "type='picture': want one of"),
        ([entry("../a.png")], "leaves the data folder"),
        ([entry("/a.png")], "leaves the data folder"),
        ([entry("a.png", width=0)], "width=0: want an integer"),
        ([entry("a.png", height="tall")], "height='tall'"),
        ({"a": 1}, "want a list of entries"),
        ([entry("a.png"), entry("b.png")], "none of its 2 files is there"),
    ],
)
def test_bad_tables_are_errors_with_entry_and_fix(tmp_path, entries, message):
    with pytest.raises(DataError, match=message):
        split(table(tmp_path, entries))


def test_missing_and_broken_tables_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"no metadata\.json or metadata\.csv in"):
        split(tmp_path)
    (tmp_path / "metadata.json").write_text("[{")
    with pytest.raises(DataError, match="cannot be read"):
        split(tmp_path)


def test_only_selects_images_or_videos(tmp_path):
    root = made(tmp_path)
    assert {r.kind for r, _ in split(root, only="image").rows} == {"image"}
    assert {r.kind for r, _ in split(root, only="video").rows} == {"video"}
    with pytest.raises(DataError, match="only=video: none of the 4 entries"):
        split(made(tmp_path / "images", 4, 0), only="video")


def test_repeated_videos_have_independent_randomness(tmp_path):
    root = made(tmp_path, 4, 4, 24)
    items, val = split(root, video_repeat=3), split(root, "val", video_repeat=3)
    names = [items.id(i) for i in range(len(items))]
    assert len(set(names)) == len(names)
    kinds = [row.kind for row, _ in items.rows]
    assert kinds.count("video") == 3 * len({r.file for r, _ in items.rows if r.kind == "video"})
    assert all(n == 0 for _, n in val.rows)
    same = [i for i, (r, _) in enumerate(items.rows) if r.kind == "video"][:3]
    shown = [items.load(i, keyed(0, "data", 0, names[i]))["video"] for i in same]
    assert not all(torch.equal(shown[0], other) for other in shown[1:])


def test_captions_are_dropped_in_training_with_the_set_probability(tmp_path):
    items = split(made(tmp_path, 8, 0), text_drop_ratio=0.5)
    empty = [items.load(0, keyed(seed))["caption"] == "" for seed in range(60)]
    assert 15 < sum(empty) < 45
    val = split(tmp_path, "val", text_drop_ratio=1.0)
    assert val.load(0, keyed(0))["caption"]


def test_splits_and_the_validation_table_share_no_files(tmp_path):
    root = made(tmp_path)
    entries = json.loads((root / "metadata.json").read_text())
    table(root, [*entries, *(e | {"text": "again"} for e in entries)])
    train_files, val_files = ({r.file for r, _ in split(root, n).rows} for n in ("train", "val"))
    assert not train_files & val_files
    table(root, entries[:12])
    other = table(root, entries[11:], "val.json") / "val.json"
    with pytest.raises(DataError, match="1 of its files are also in"):
        split(root, val_meta_path=str(other))
    table(root, entries[12:], "val.json")
    assert len(split(root, "val", val_meta_path=str(other))) == 4


def test_broken_and_missing_files_are_replaced_by_files_of_the_same_size(tmp_path):
    root = made(tmp_path, 10, 10)
    train_rows = [r for r, _ in split(root).rows]
    gone = [next(r.file for r in train_rows if r.kind == kind) for kind in ("image", "video")]
    (root / gone[0]).unlink()
    (root / gone[1]).write_bytes(b"no video")
    first, again = ([*Loader(split(root), 3, 0)] for _ in range(2))
    assert [b.ids for b in first] == [b.ids for b in again]
    assert not {i for b in first for i in b.ids} & set(gone)
    assert {line.split(":")[0] for b in first for line in b.bad} == set(gone)


def test_validation_has_all_sizes(tmp_path):
    found = list(batches(split(made(tmp_path), "val", val_fraction=0.5), 2))
    assert {b.video.shape[2] for b in found} == {1, 9}
    assert sum(b.size for b in found) == len(split(tmp_path, "val", val_fraction=0.5))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"video_repeat": 0}, "video_repeat=0: want >= 1; only=image excludes videos"),
        ({"frames": 16}, "frames=16: want 1 or a multiple of frame_interval=9, such as 9 or 18"),
        ({"frames": 4}, "such as 9"),
        ({"ratios": (0.5, 0.3)}, "ratios=0.3: want one of"),
        ({"ratios": (0.25,), "random_ratio_crop": True}, "ratios=0.25: want one of"),
        ({"width": 32}, "height=16, width=32: want equal values"),
        ({"enable_bucket": False, "random_ratio_crop": True}, "want enable_bucket=true"),
        ({"only": "videos"}, "only='videos': want one of"),
        ({"text_drop_ratio": 1.5}, "text_drop_ratio=1.5"),
    ],
)
def test_bad_settings_are_reported(setting, message):
    assert any(message in p for p in replace(CONFIG, **setting).problems())


def test_frames_that_do_not_fit_the_windows_of_the_first_stage_are_an_error():
    windows = ("vae=magvit", "data=easyanimate_json", "data.frames=16", "data.frame_interval=8")
    with pytest.raises(ConfigError, match=r"data\.frames=16 does not fit vae=magvit, which wants"):
        wire(composed(*windows))


# --- joint training -------------------------------------------------------------------------------

NETWORK = ("data=easyanimate_json", "vae=magvit", "vae.weights=null", "backbone=easyanimate",
           "vae.ch=8", "vae.norm_num_groups=2", "backbone.sample_size=128",
           "backbone.num_attention_heads=6", "backbone.num_layers=2", "conditioning=t5",
           "conditioning.sizes=true")  # fmt: skip


def test_images_and_videos_train_one_network_conditioned_on_sizes(tmp_path):
    root = made(tmp_path / "data", 8, 4)
    own = [o for o in TINY if o.startswith(("sampler", "trainer", "logger", "data.batch"))]
    wiring = wire(composed(*own, *NETWORK, f"data.root={root}", "steps=4"))
    assert {c.frames for c in wiring.clips} == {1, 9}
    seen: list[tuple[int, ...]] = []
    trained = train(wiring, tmp_path / "out")
    assert len(trained.losses) == 4 and all(np.isfinite(trained.losses))
    loader = Loader(split(root), 2, wiring.root.seed)
    system = trained.system.eval()
    for batch in loader:
        terms = system.step(batch, system.draws(batch))
        assert terms.total.isfinite()
        seen.append(tuple(batch.video.shape[2:]))
    assert {(1, 16, 16), (1, 8, 16), (9, 16, 16)} == set(seen)
    assert sampled(system).shape == (2, 3, 9, 16, 16)
