"""A folder of videos and images, with captions in .txt files of the same name or a captions.csv."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.captions import first_captions, read_caption_file, read_caption_table
from plugins._blocks.folders import (
    check_split,
    file_identity,
    files_below,
    folder_of,
    printable,
    split_by_hash,
)
from plugins._blocks.video_io import CONTAINERS, IMAGES, Fit, chooser, read_image, read_video
from sandbox.contracts import BadItem, DataConfig, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

CAPTIONS = ("auto", "none")
MISSING = ("skip", "empty")
PLACES = ("random", "centre")
TABLE = "captions.csv"

log = logging.getLogger(__name__)


@register("data", "video_folder")
class VideoFolder:
    """mp4, webm and gif files, or images for frames=1, with captions in .txt or captions.csv."""

    @dataclass
    class Config(DataConfig):
        """Settings in addition to those of every data plugin.

        stride: file frames between clip frames; start, crop: "random" or "centre" in training
        (validation uses the centre); captions: "auto" (a row of captions.csv, else the .txt file
        of the same name) or "none"; missing_caption: "skip" counts the file as unusable, "empty"
        uses ""; val_fraction: fraction of files held out, by a hash of their names, unless there
        are folders train/ and val/; num_prompts: validation captions to sample with.
        """

        stride: int = 1
        start: str = "random"
        crop: str = "centre"
        captions: str = "auto"
        missing_caption: str = "skip"
        val_fraction: float = 0.05
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("stride", self.stride, 1)
            yield from one_of("start", self.start, PLACES)
            yield from one_of("crop", self.crop, PLACES)
            yield from one_of("captions", self.captions, CAPTIONS)
            yield from one_of("missing_caption", self.missing_caption, MISSING)
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from in_range("num_prompts", self.num_prompts, 0)

        def files(self) -> dict[str, str | None]:
            return {"root": self.root}

        def provides(self) -> frozenset[str]:
            fields = {"video"}
            if self.frames > 1:
                fields |= {"fps", "frame_stride"}
            if self.captions != "none":
                fields |= {"captions", "prompts"} if self.num_prompts else {"captions"}
            return frozenset(fields)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Files":
        """Clips of "train" or "val". Raises DataError if there are none, or no such folder."""
        check_split(name)
        root = folder_of(self.cfg)
        found = UsableFiles(root, self.cfg.frames)
        names = self._names(found, name)
        if not names:
            raise DataError(
                f"data.root={self.cfg.root}: no file for {name!r}, {len(found.names)} usable in all"
                f"{found.summary()}; add files, or make folders train/ and val/ in it"
            )
        if found.excluded and name == "train":
            log.warning("data.root=%s: excluded%s", self.cfg.root, found.summary())
        captions = None if self.cfg.captions == "none" else Captions(root, found.names, self.cfg)
        return Files(
            root, names, self.cfg, captions, training=name == "train", excluded=found.excluded
        )

    def prompts(self) -> list[str]:
        """Captions of the first validation files that have one."""
        if "prompts" not in self.cfg.provides():
            return []
        val = self.split("val")
        return first_captions(val.names, val.caption, self.cfg.num_prompts)

    def _names(self, found: "UsableFiles", split: str) -> list[str]:
        sides = {s: [n for n in found.names if n.startswith(f"{s}/")] for s in ("train", "val")}
        if all(sides.values()):
            return sides[split]
        return split_by_hash(found.names, str, self.cfg.val_fraction, split)


class UsableFiles:
    """Sorted names of the files below a folder that can give clips, with "/" between folders.

    Follows links. A file with several names counts once, so it cannot be in both splits.
    """

    def __init__(self, root: Path, frames: int) -> None:
        self.names: list[str] = []
        self.excluded: dict[str, int] = {}  # reason -> number of files
        usable = set(CONTAINERS) | (set(IMAGES) if frames == 1 else set())
        seen: set[object] = set()
        for name in sorted(files_below(root)):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in usable:
                if (identity := file_identity(root / name)) in seen:
                    self._exclude("second names of a file")
                else:
                    seen.add(identity)
                    self.names.append(name)
            elif suffix in IMAGES:
                self._exclude(f"images, because data.frames={frames}")

    def summary(self) -> str:
        """ ", 2 images, because data.frames=9" for each reason."""
        return "".join(f", {n} {why}" for why, n in self.excluded.items())

    def _exclude(self, why: str) -> None:
        self.excluded[why] = self.excluded.get(why, 0) + 1


class Captions:
    """Name -> caption, from captions.csv (in the root, train/ or val/), else from the .txt file."""

    def __init__(self, root: Path, names: list[str], cfg: VideoFolder.Config) -> None:
        self.root, self.missing = root, cfg.missing_caption
        self.rows: dict[str, str] = {}
        for folder in ("", "train/", "val/"):
            path = root / folder / TABLE
            if path.is_file():
                table = read_caption_table(path)
                self.rows |= {folder + file: caption for file, caption in table.items()}
        if self.rows and not self.rows.keys() & set(names):
            first = next(iter(self.rows))
            raise DataError(
                f"{root / TABLE}: none of its {len(self.rows)} files is there, such as {first!r}"
            )

    def __call__(self, name: str) -> str:
        """Raises BadItem if the file has no caption and `missing_caption` is "skip"."""
        try:
            text = self.rows.get(name) or read_caption_file(self.root / name)
        except (OSError, UnicodeDecodeError) as e:
            file = PurePosixPath(name).with_suffix(".txt").name
            raise BadItem(f"its caption {file} cannot be read: {e}") from e
        if not text and self.missing == "skip":
            raise BadItem("has no caption; data.missing_caption=empty keeps it")
        return text


@dataclass
class Files:
    """The clips of one split, by the names of their files relative to `root`."""

    root: Path
    names: list[str]
    cfg: VideoFolder.Config
    captions: Captions | None
    training: bool
    excluded: dict[str, int]  # reason -> number of files

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        return printable(self.names[index])

    def caption(self, name: str) -> str:
        """Raises BadItem if there is none."""
        if self.captions is None:
            raise BadItem("has no caption, because data.captions=none")
        return self.captions(name)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        name, cfg = self.names[index], self.cfg
        path = self.root / name
        sample: Sample = {} if self.captions is None else {"caption": self.caption(name)}
        fit = Fit(cfg.height, cfg.width, chooser(self.training and cfg.crop == "random", rng))
        if path.suffix.lower() in IMAGES:
            return sample | {"video": read_image(path, fit)}
        start = chooser(self.training and cfg.start == "random", rng)
        video, rate = read_video(path, cfg.frames, cfg.stride, start, fit)
        if cfg.frames > 1:
            sample |= {"fps": rate / cfg.stride, "frame_stride": float(cfg.stride)}
        return sample | {"video": video}
