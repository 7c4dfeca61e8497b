"""CelebA-HQ: preprocessing as published, list files, splits, unusable files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from plugins.data.celebahq import CelebAHQ, prepare
from sandbox.contracts import BadItem, DataError
from sandbox.data import Loader
from sandbox.randomness import keyed

GOLDEN = Path(__file__).parents[2] / "golden" / "ldm"
CONFIG = CelebAHQ.Config(height=16, width=16)


def npy(path: Path, level: int = 0, shape: tuple[int, ...] = (1, 3, 20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.full(shape, level, np.uint8))


def items(root: Path, split: str = "train", **settings):
    return CelebAHQ(replace(CONFIG, root=str(root), **settings)).split(split)


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "celebahq_preprocess.json").read_text())["cases"]
)
def test_preprocessing_equals_the_original(case):
    recorded = load_file(GOLDEN / "celebahq_preprocess.safetensors")
    image = recorded[f"in/{case['i']}/image_chw"].numpy()
    made = prepare(image, case["size"], case["size"])[:, 0].permute(1, 2, 0)
    # two grey levels: OpenCV interpolates with integers
    torch.testing.assert_close(made, recorded[f"out/{case['i']}/image_hwc"], rtol=0, atol=0.016)


def test_npy_and_image_files_give_the_same_clip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (3, 20, 24), dtype=np.uint8)
    for side in ("train", "val"):
        npy(tmp_path / side / "a.npy")
        np.save(tmp_path / side / "a.npy", image[None])
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / side / "b.png")
    found = items(tmp_path)
    one, other = (found.load(i, keyed(0))["video"] for i in range(2))
    assert one.shape == (3, 1, 16, 16)
    assert torch.equal(one, other)


def test_list_files_define_the_splits(tmp_path):
    for i in range(4):
        npy(tmp_path / "data" / f"{i}.npy", i)
    (tmp_path / "train.txt").write_text("2.npy\n0.npy\n\n")
    (tmp_path / "val.txt").write_text("3.npy\n")
    lists = {n: str(tmp_path / f"{n[:-5]}.txt") for n in ("train_list", "val_list")}
    assert items(tmp_path / "data", **lists).names == ["2.npy", "0.npy"]
    assert items(tmp_path / "data", "val", **lists).names == ["3.npy"]


def test_lists_that_share_a_name_are_refused(tmp_path):
    npy(tmp_path / "0.npy")
    (tmp_path / "l.txt").write_text("0.npy\n")
    with pytest.raises(DataError, match=r"val_list=.*'0.npy'"):
        items(tmp_path, train_list=str(tmp_path / "l.txt"), val_list=str(tmp_path / "l.txt"))


def test_splits_without_lists_share_nothing(tmp_path):
    for i in range(30):
        npy(tmp_path / f"{i}.npy")
    train, val = (set(items(tmp_path, s).names) for s in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert len(train | val) == 30


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b"no array"),
        lambda p: p.write_bytes(b""),
        lambda p: np.save(p, np.zeros((1, 3, 8, 8), np.float32)),
        lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True),
        lambda p: None,
    ],
    ids=["text", "empty", "float", "pickle", "absent"],
)
def test_unusable_files_are_bad_items(tmp_path, write):
    write(tmp_path / "bad.npy")
    npy(tmp_path / "good.npy")
    for name, text in (("t.txt", "bad.npy\n"), ("v.txt", "good.npy\n")):
        (tmp_path / name).write_text(text)
    lists = {"train_list": str(tmp_path / "t.txt"), "val_list": str(tmp_path / "v.txt")}
    with pytest.raises(BadItem):
        items(tmp_path, **lists).load(0, keyed(0))


def test_loader_replaces_and_counts_them(tmp_path):
    for i in range(6):
        npy(tmp_path / "train" / f"{i}.npy", i)
    npy(tmp_path / "val" / "0.npy")
    (tmp_path / "train" / "6.npy").write_bytes(b"broken")
    loader = Loader(items(tmp_path), 7, 0, 0, 1, num_workers=0, max_bad=1)
    assert next(iter(loader)).video.shape == (7, 3, 1, 16, 16)
    assert [*loader.bad] == ["train/6.npy"]
