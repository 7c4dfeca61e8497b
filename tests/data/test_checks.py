"""What is found before a run: samples that break the contract, splits without a usable clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.config import discovery, registry
from sandbox.config.root import to_container
from sandbox.contracts import DataError, PluginError
from sandbox.data.batching import summary
from sandbox.data.checks import check_samples
from sandbox.distributed.rank import Rank
from sandbox.tasks.train import train
from tests.plugins.data.test_video_folder import corrupt, write_video
from tests.training_sessions import small

PLUGIN = """
from dataclasses import dataclass
import numpy as np
import torch
from sandbox.contracts import DataConfig
from sandbox.registry import register

BASE = torch.linspace(-1, 1, 3 * 5 * 16 * 32).view(3, 5, 16, 32)  # (3, T, H, W)
SAMPLES = {
    "right": lambda: {"video": BASE},
    "right, dark": lambda: {"video": BASE.clamp(max=-0.5)},
    "right, more keys": lambda: {"video": BASE, "file": "a.mp4"},
    "right, over": lambda: {"video": BASE * 1.2},
    "right, half": lambda: {"video": BASE.half()},
    "right, grey and white": lambda: {"video": (BASE + 1) / 2 * 254 / 255 + 1 / 255},
    "bytes": lambda: {"video": ((BASE + 1) * 127.5).to(torch.uint8)},
    "doubles": lambda: {"video": BASE.double()},
    "255": lambda: {"video": (BASE + 1) * 127.5},
    "unit": lambda: {"video": (BASE + 1) / 2},
    "not finite": lambda: {"video": BASE / BASE.clamp(min=0).sign()},
    "frames first": lambda: {"video": BASE.transpose(0, 1)},
    "channels last": lambda: {"video": BASE.permute(1, 2, 3, 0)},
    "image": lambda: {"video": BASE[:, 0]},
    "batch": lambda: {"video": BASE[None]},
    "other size": lambda: {"video": BASE[..., :16]},
    "array": lambda: {"video": BASE.numpy()},
    "other name": lambda: {"videos": BASE},
    "no caption": lambda: {"video": BASE, "caption": None},
    "caption of bytes": lambda: {"video": BASE, "caption": b"a cat"},
    "captions": lambda: {"video": BASE, "caption": ["a cat", "a dog"]},
    "tuple": lambda: (BASE, "a cat"),
    "fps": lambda: {"video": BASE, "fps": float("nan")},
    "fps of text": lambda: {"video": BASE, "fps": "24"},
}


@register("data", "own")
class Own:
    '''Clips of a user.'''

    @dataclass
    class Config(DataConfig):
        how: str = "right"

        def provides(self):
            return frozenset({"video", "captions"})

    def __init__(self, cfg):
        self.cfg = cfg

    def split(self, name):
        return Clips(self.cfg.how)


@dataclass
class Clips:
    how: str

    def __len__(self):
        return 6

    def id(self, index):
        return f"clip {index}"

    def load(self, index, rng):
        sample = SAMPLES[self.how]()
        return sample if type(sample) is tuple else {"caption": "a cat"} | sample
"""
WRONG = {
    "bytes": r"'video' is torch\.uint8: want torch\.float32, such as x\.float\(\) / 127\.5 - 1",
    "doubles": r"torch\.float64: want torch\.float32",
    "255": r"values from 0 to 255: want \[-1, 1\], such as x / 127\.5 - 1",
    "unit": r"values from 0 to 1 in 4 samples: want \[-1, 1\], such as 2 \* x - 1",
    "not finite": "values that are not finite",
    "frames first": r"shape \(5, 3, 16, 32\): want \(3, 5, 16, 32\); .*transpose\(0, 1\)",
    "channels last": r"shape \(5, 16, 32, 3\): want .*permute\(3, 0, 1, 2\)",
    "image": r"shape \(3, 16, 32\): want .*image\[:, None\]",
    "batch": r"shape \(1, 3, 5, 16, 32\): want \(3, 5, 16, 32\)",
    "other size": r"shape \(3, 5, 16, 16\): want \(3, 5, 16, 32\)",
    "array": r"numpy\.ndarray: want a tensor",
    "other name": r"no 'video', which Config\.provides\(\) lists; it has \['caption', 'videos'\]",
    "no caption": "'caption' is NoneType None: want text",
    "caption of bytes": "'caption' is bytes b'a cat': want text",
    "captions": "'caption' is list .*want text",
    "tuple": r"returned a tuple of 2 .*want Sample; the interface is Items",
    "fps": "'fps' is float nan: want a finite number",
    "fps of text": "'fps' is str '24'",
}
RIGHT = (
    "right",
    "right, grey and white",
    "right, dark",
    "right, more keys",
    "right, over",
    "right, half",
)


@pytest.fixture
def own(plugin_folder):
    (plugin_folder / "data").mkdir()
    (plugin_folder / "data" / "own.py").write_text(PLUGIN)
    discovery.setup()
    return registry.default("data", "own")


def check(cfg) -> None:
    cfg = replace(cfg, frames=5, height=16, width=32)
    check_samples(registry.create(cfg).split("train"), cfg, "train", 0)


def test_samples_that_break_the_contract_are_named(own):
    for how, problem in WRONG.items():
        with pytest.raises(PluginError, match=problem) as e:
            check(replace(own, how=how))
        assert "data=own" in str(e.value) and "own.py" in str(e.value), how


def test_samples_that_keep_the_contract_pass(own):
    for how in RIGHT:
        check(replace(own, how=how))


# --- before a run folder is made ------------------------------------------------------------------


def settings(out: Path, root: Path, *words: str) -> dict:
    words = ("data=video_folder", f"data.root={root}", "data.frames=5", "steps=2",
             "data.batch_size=1", "task.score_clips=6", "task.samples=1",
             "task.untrained=false", *words)  # fmt: skip
    cfg = replace(small_on_files(*words), out=str(out), cache=str(out / "cache"))
    return {"root": to_container(cfg), "overrides": [], "group": None}


def small_on_files(*words: str):
    from sandbox.config.wiring import wire
    from tests.helpers import TINY, composed

    taken = {w.partition("=")[0] for w in words} | {"data.clips_per_epoch"}
    return wire(composed(*(w for w in TINY if w.partition("=")[0] not in taken), *words)).root


def captioned(root: Path, names: list[str]) -> None:
    for name in names:
        write_video(root / name, 5)
        (root / name).with_suffix(".txt").write_text("a cat")


def clips(root: Path, train: int, val: int) -> list[Path]:
    """Paths of the validation clips."""
    captioned(root, [f"train/{i}.mp4" for i in range(train)])
    captioned(root, [f"val/{i}.mp4" for i in range(val)])
    return [root / f"val/{i}.mp4" for i in range(val)]


def test_a_wrong_sample_is_found_before_a_run_folder(own, tmp_path):
    data = replace(own, how="255", batch_size=2, frames=5, height=16, width=32)
    root = replace(small(), metric=None, out=str(tmp_path / "out"), data=data)
    with pytest.raises(PluginError, match="values from 0 to 255"):
        train({"root": to_container(root), "overrides": [], "group": None}, Rank())
    assert not (tmp_path / "out").exists()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    write_video(path, 2)


def bare(path: Path) -> None:
    path.with_suffix(".txt").unlink()


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html></html>")


HARMS = {corrupt: "has no video", empty: "it is empty", short: "has 2 frames, want 5",
         bare: "has no caption", html: "it is a web page"}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_validation_split_without_a_usable_clip_is_found_before_a_run_folder(tmp_path, harm):
    for path in clips(tmp_path / "clips", 3, 2):
        harm(path)
    with pytest.raises(DataError, match="none of the 2 clips of 'val' is usable: fix") as e:
        train(settings(tmp_path / "out", tmp_path / "clips"), Rank())
    assert HARMS[harm] in str(e.value)
    assert not (tmp_path / "out").exists()


def test_too_few_clips_for_a_batch_are_found_before_a_run_folder(tmp_path):
    clips(tmp_path / "clips", 3, 2)
    with pytest.raises(DataError, match=r"there are 3: set data\.batch_size=3"):
        train(settings(tmp_path / "out", tmp_path / "clips", "data.batch_size=4"), Rank())
    assert not (tmp_path / "out").exists()


def test_one_clip_is_enough_to_train(tmp_path, capfd):
    captioned(tmp_path / "clips", ["one.mp4"])
    result = train(settings(tmp_path / "out", tmp_path / "clips"), Rank())
    assert result["steps"] == 2
    assert "unusable" not in capfd.readouterr().out


def test_unusable_clips_of_both_splits_are_counted_on_the_console_and_listed(tmp_path, capfd):
    corrupt(clips(tmp_path / "clips", 4, 3)[1])
    empty(tmp_path / "clips" / "train" / "2.mp4")
    bare(tmp_path / "clips" / "train" / "3.mp4")
    words = ("steps=4", "data.batch_size=2")
    result = train(settings(tmp_path / "out", tmp_path / "clips", *words), Rank())
    listed = json.loads((Path(result["folder"]) / "metrics.json").read_text())["skipped"]
    assert listed.keys() == {"train/2.mp4", "train/3.mp4", "val/1.mp4"}
    out = capfd.readouterr().out
    assert "data    3 clips are unusable (" in out and "1 x has no caption" in out
    assert "metrics.json" in out.splitlines()[-1]


def test_a_summary_names_the_most_frequent_reasons():
    bad = {f"{i}": f"reason {min(i, 5)}" for i in range(12)}
    assert summary(bad) == (
        "12 clips are unusable (7 x reason 5, 1 x reason 0, 1 x reason 1, 1 x reason 2, "
        "2 other reasons)"
    )
    assert summary({"a": "is empty"}) == "1 clip is unusable (1 x is empty)"
