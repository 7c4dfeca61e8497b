"""WebVid: strides, fps, skipping and cropping as recorded from the original, and carry_stride."""

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plugins.data.webvid import Clips, Picker, WebVid, read_rows, transform, video_path
from sandbox.contracts import BadItem, DataError
from sandbox.data.randomness import keyed
from tests.plugins.data.test_video_folder import write_video

GOLDEN = Path(__file__).parents[2] / "golden" / "dynamicrafter"
RECORD = json.loads((GOLDEN / "webvid.json").read_text())
CONFIG = WebVid.Config(frames=3, height=16, width=16)


def fake_read(path: Path, pick: Any, shape: Any) -> tuple[list[np.ndarray], float]:
    """The recorded stand-in for a decoder: frame[i, y, x, c] by formula."""
    if path.stem in RECORD["missing_video_ids_raise_on_open"]:
        raise BadItem("cannot be opened")
    video = RECORD["fake_videos"][path.stem]
    y, x, c = np.ogrid[: video["h"], : video["w"], :3]
    plane = 5 * y + 7 * x + 11 * c + (x * y) % 13
    chosen = pick(video["n_frames"], video["avg_fps"])
    return [((3 * i + plane) % 256).astype(np.uint8) for i in chosen], video["avg_fps"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*RECORD["csv_rows"][0]])
        table.writeheader()
        table.writerows(RECORD["csv_rows"])
    return read_rows(path)


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda c: f"{c['variant']}-{c['index']}")
def test_clips_equal_the_original(rows, case):
    given = dict(case["kwargs"])
    height, width = given.pop("resolution")
    given = {k: v for k, v in given.items() if k not in ("data_dir", "load_raw_resolution")}
    given["frames"] = given.pop("video_length")
    cfg = WebVid.Config(height=height, width=width, carry_stride=True, **given)
    shown: list[list[int]] = []

    def read(path: Path, pick: Any, shape: Any) -> Any:
        def noted(number: int, rate: float) -> list[int]:
            shown.append(pick(number, rate))
            return shown[-1]

        return fake_read(path, noted, shape)

    chance = random.Random(case["random_seed"])
    sample = Clips(Path("/data"), rows, cfg, True, read).draw(case["index"], chance.randint)
    assert shown[-1] == case["frame_indices"]
    assert (sample["caption"], sample["fps"], sample["frame_stride"]) == (
        case["caption"], case["fps"], case["frame_stride"]
    )  # fmt: skip
    video, tolerance = sample["video"], RECORD["tolerance"]
    assert list(video.shape) == case["shape"]
    found = [video.min().item(), video.max().item(), video.mean().item()]
    assert found == pytest.approx([case[k] for k in ("min", "max", "mean")], rel=1e-4, abs=2e-3)
    recorded = load_file(GOLDEN / "webvid.safetensors")
    for name, frame in (("frame0", 0), ("frame_last", -1)):
        key = f"out/{case['variant']}/{case['index']}/{name}"
        if key in recorded:
            torch.testing.assert_close(video[:, frame], recorded[key], **tolerance)


@pytest.mark.parametrize(("height", "width"), [(12, 20), (40, 8)])
def test_resize_ignores_the_aspect_ratio(height, width):
    """The published transform: torchvision's Resize to (height, width) of float frames."""
    from torchvision.transforms import Resize

    images = [np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8) for i in range(3)]
    cfg = WebVid.Config(frames=3, height=height, width=width, spatial_transform="resize")
    assert not [p for p in cfg.problems() if p.startswith("spatial_transform")]
    frames = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2).float()
    want = (Resize([height, width])(frames) / 255 - 0.5) * 2
    torch.testing.assert_close(transform(images, cfg), want)


def test_rows_with_an_empty_field_are_dropped(rows):
    assert [r["videoid"] for r in rows] == ["1", "2", "3", "4", "5"]


def test_a_rejected_video_passes_on_its_stride_only_with_carry_stride(rows):
    cfg = WebVid.Config(frames=16, height=8, width=8, frame_stride=2, fixed_fps=24.0)
    slow = [r for r in rows if r["videoid"] in ("5", "1")][::-1]  # 20 frames at 59.94, then 100

    def stride(carry: bool, first: int) -> float:
        clips = Clips(Path("/data"), slow, replace(cfg, carry_stride=carry), True, fake_read)
        return clips.draw(first, lambda low, high: low)["frame_stride"]

    with pytest.raises(BadItem, match=r"24\.0 fps"):
        stride(False, 0)
    own = stride(False, 1)
    assert own == int(2 * 29.97 / 24)
    assert stride(True, 0) == int(int(2 * 59.94 / 24) * 29.97 / 24)


@pytest.fixture
def folder(tmp_path):
    lines = ["videoid,page_dir,name"]
    for i in range(4):
        write_video(tmp_path / "videos" / "p" / f"{i}.mp4", 12)
        lines.append(f'{i},p,"clip, number {i}"')
    lines.append("9,p,not there")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def test_videos_of_the_csv_are_read(folder):
    train = WebVid(replace(CONFIG, root=str(folder), frame_stride=2)).split("train")
    index = next(i for i, r in enumerate(train.rows) if r["videoid"] != "9")
    sample = train.load(index, keyed(0))
    assert sample["video"].shape == (3, 3, 16, 16)
    assert sample["caption"].startswith("clip, number")
    assert (sample["fps"], sample["frame_stride"]) == (5.0, 2.0)  # 10 fps
    levels = ((sample["video"].mean((0, 2, 3)) + 1) * 127.5 / 8).round()
    assert levels.diff().tolist() == [2, 2]


def test_splits_share_no_video(folder):
    source = WebVid(replace(CONFIG, root=str(folder)))
    train, val = ({video_path(r) for r in source.split(s).rows} for s in ("train", "val"))
    assert val
    assert not train & val
    assert len(train | val) == 5
    assert len(source.prompts()) == len(val)


def test_validation_is_not_random(folder):
    val = WebVid(
        replace(CONFIG, root=str(folder), frame_stride=3, random_fs=True, val_fraction=0.9)
    ).split("val")
    index = next(i for i, r in enumerate(val.rows) if r["videoid"] != "9")
    one, other = (val.load(index, keyed(k)) for k in (0, 1))
    assert torch.equal(one["video"], other["video"])
    assert one["frame_stride"] == 3


def test_a_missing_video_is_a_bad_item(folder):
    rows = [r for r in read_rows(folder / "metadata.csv") if r["videoid"] == "9"]
    with pytest.raises(BadItem):
        Clips(folder, rows, CONFIG, True).load(0, keyed(0))


def test_random_strides_include_both_ends():
    cfg = replace(CONFIG, frame_stride=4, frame_stride_min=2, random_fs=True)
    rng = np.random.default_rng(0)
    drawn = {Picker(cfg, lambda a, b: int(rng.integers(a, b + 1))).stride for _ in range(60)}
    assert drawn == {2, 3, 4}


def test_a_missing_column_is_an_error(tmp_path):
    (tmp_path / "t.csv").write_text("videoid,name\n1,a\n")
    with pytest.raises(DataError, match="page_dir"):
        read_rows(tmp_path / "t.csv")


def test_rows_that_leave_the_folder_are_errors(tmp_path):
    (tmp_path / "t.csv").write_text("videoid,page_dir,name\n../../x,p,a\n")
    with pytest.raises(DataError, match="leaves"):
        read_rows(tmp_path / "t.csv")
