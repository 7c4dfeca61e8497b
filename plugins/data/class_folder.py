"""Folders of videos or images, one folder for each class, as UCF-101 and ImageNet have.

UCF-101 (Soomro et al. 2012, 1212.0402): 13,320 videos of 101 actions, CLASS/v_CLASS_g01_c01.avi;
the clips of a group (g01) come from one recording.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.clips import clip_files, read_clip, usable_endings
from plugins._blocks.folders import (
    Unused,
    check_split,
    folder_of,
    inside,
    printable,
    split_by_hash,
)
from sandbox.contracts import DataConfig, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

PLACES = ("random", "centre")
SIDES = ("train", "val")
OF_RECORDING = re.compile(r"_c\d+$")  # v_CLASS_g01_c01 and v_CLASS_g01_c02 are one recording
SHOWN = 5  # names in an error


@register("data", "class_folder")
class ClassFolder:
    """Videos, or images for frames=1, in a folder for each class (UCF-101, ImageNet)."""

    @dataclass
    class Config(DataConfig):
        """Settings in addition to those of every data plugin.

        num_classes: number of folders with clips; classes are numbered in the order of their names.
        stride: file frames between clip frames; start, crop: "random" or "centre" in training
        (validation uses the centre). train_list, val_list: text files of names relative to `root`,
        one per line, as UCF-101's trainlist01.txt. Without lists, train/CLASS and val/CLASS are the
        splits, and without such folders val_fraction is held out, by a hash of the names of
        recordings. num_prompts: classes to sample.
        """

        num_classes: int = 2
        stride: int = 1
        start: str = "random"
        crop: str = "centre"
        train_list: str | None = None
        val_list: str | None = None
        val_fraction: float = 0.05
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("num_classes", self.num_classes, 1)
            yield from in_range("stride", self.stride, 1)
            yield from one_of("start", self.start, PLACES)
            yield from one_of("crop", self.crop, PLACES)
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from in_range("num_prompts", self.num_prompts, 0)
            if (self.train_list is None) != (self.val_list is None):
                yield f"val_list={self.val_list}: want both train_list and val_list, or neither"

        def files(self) -> dict[str, str | None]:
            lists = {"train_list": self.train_list, "val_list": self.val_list}
            return {"root": self.root} | {k: v for k, v in lists.items() if v is not None}

        def provides(self) -> frozenset[str]:
            fields = {"video", "captions", "label"}
            if self.frames > 1:
                fields |= {"fps", "frame_stride"}
            return frozenset(fields | {"prompts"} if self.num_prompts else fields)

        def labels(self) -> int:
            return self.num_classes

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self._found: Found | None = None

    def split(self, name: str) -> "ClassClips":
        """Clips of "train" or "val". Raises DataError if there are none, or for other classes."""
        check_split(name)
        found = self._files()
        names = found.sides[name]
        if not names:
            raise DataError(
                f"data.root={self.cfg.root}: no file for {name!r}{found.unused.summary()}; want "
                f"folders of classes with files ({', '.join(usable_endings(self.cfg.frames))})"
            )
        if name == "train":
            found.unused.report(self.cfg)
        return ClassClips(folder_of(self.cfg), names, self.cfg, found, training=name == "train")

    def prompts(self) -> list[str]:
        """Names of classes, evenly spaced."""
        count = min(self.cfg.num_prompts, self.cfg.num_classes)
        classes = self._files().classes if count else []
        return [classes[i * len(classes) // count] for i in range(count)]

    def label(self, caption: str) -> int | None:
        classes = self._files().classes
        return classes.index(caption) if caption in classes else None

    def _files(self) -> "Found":
        """The files of both splits, found on the first call."""
        if self._found is None:
            self._found = find(self.cfg)
        return self._found


@dataclass
class Found:
    """The names of the clips of each split, the names of the classes, and what is not used.

    depth: number of folders above those of the classes.
    """

    sides: dict[str, list[str]]
    classes: list[str]
    unused: Unused
    depth: int

    def class_of(self, name: str) -> str:
        return PurePosixPath(name).parts[self.depth]


def find(cfg: ClassFolder.Config) -> Found:
    """Raises DataError for a number of classes other than `num_classes`."""
    root, unused = folder_of(cfg), Unused()
    names, others = clip_files(root, cfg.frames, unused)
    for name in others:
        unused.add_file(name)
    if cfg.train_list:
        sides = listed(cfg, root, names, unused)
        names = [*sides["train"], *sides["val"]]
    else:
        sides = {side: [n for n in names if n.startswith(f"{side}/")] for side in SIDES}
    is_split = not cfg.train_list and all(sides.values())
    if is_split:
        unused.add("clips outside train/ and val/", len(names) - sum(map(len, sides.values())))
        names = [*sides["train"], *sides["val"]]
    depth = int(bool(names) and all(n.startswith(("train/", "val/")) for n in names))
    labelled = [n for n in names if len(PurePosixPath(n).parts) > depth + 1]
    unused.add("clips without a class, because no folder of a class has them",
               len(names) - len(labelled))  # fmt: skip
    classes = sorted({PurePosixPath(name).parts[depth] for name in labelled})
    if labelled and len(classes) != cfg.num_classes:
        shown = ", ".join(map(printable, classes[:SHOWN])) + ", ..." * (len(classes) > SHOWN)
        raise DataError(
            f"data.num_classes={cfg.num_classes}: there are {len(classes)} folders of classes in "
            f"data.root={cfg.root} ({shown}); set data.num_classes={len(classes)}"
        )
    if is_split or cfg.train_list:
        kept = set(labelled)
        sides = {side: [n for n in of_side if n in kept] for side, of_side in sides.items()}
    else:
        sides = {s: split_by_hash(labelled, recording, cfg.val_fraction, s) if labelled else []
                 for s in SIDES}  # fmt: skip
    return Found(sides, classes, unused, depth)


def recording(name: str) -> str:
    """The recording that a clip comes from: its own name, or that of a group of UCF-101."""
    return OF_RECORDING.sub("", PurePosixPath(name).with_suffix("").as_posix())


def listed(
    cfg: ClassFolder.Config, root: Path, names: list[str], unused: Unused
) -> dict[str, list[str]]:
    """The clips that the lists name. Raises DataError for a name in both."""
    files = {"train": cfg.train_list, "val": cfg.val_list}
    rows = {side: read_names(f"data.{side}_list", str(path), root) for side, path in files.items()}
    if both := {*rows["train"]} & {*rows["val"]}:
        raise DataError(
            f"data.val_list={cfg.val_list}: {len(both)} names are also in train_list, such as "
            f"{min(both)!r}; remove them from one"
        )
    there, wanted = {*names}, {*rows["train"], *rows["val"]}
    unused.add("names of a list without a usable file", len(wanted - there))
    unused.add("files that no list names", len(there - wanted))
    return {side: sorted(there.intersection(of_side)) for side, of_side in rows.items()}


def read_names(setting: str, path: str, root: Path) -> list[str]:
    """Names relative to `root`, one per line; a number after a name, as in UCF-101, is ignored."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{setting}={path} cannot be read: {e}; want a text file of names") from e
    names = (re.sub(r"\s+\d+$", "", line.strip()) for line in lines)
    return [inside(root, name) or name for name in names if name]


@dataclass
class ClassClips:
    """The clips of one split, by the names of their files relative to `root`."""

    root: Path
    names: list[str]
    cfg: ClassFolder.Config
    found: Found
    training: bool

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        return printable(self.names[index])

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """The clip, "label" and, as its caption, the name of its class."""
        name = self.names[index]
        of_class = self.found.class_of(name)
        label = float(self.found.classes.index(of_class))
        clip = read_clip(self.root / name, self.cfg, self.training, rng)
        return {"caption": of_class, "label": label, **clip}
