"""A folder of videos and images, with captions in files of the same name or in a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.captions import (
    ENDINGS,
    TABLE,
    Captions,
    caption_files,
    first_captions,
    normalised_key,
)
from plugins._blocks.clips import clip_files, read_clip, usable_endings
from plugins._blocks.folders import (
    Unused,
    check_split,
    folder_of,
    printable,
    split_by_hash,
)
from sandbox.contracts import BadItem, DataConfig, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

CAPTIONS = ("auto", "none")
MISSING = ("skip", "empty")
PLACES = ("random", "centre")
SIDES = ("train/", "val/")


@register("data", "video_folder")
class VideoFolder:
    """Videos (mp4, mov, mkv, avi, webm, gif), or images for frames=1, with captions."""

    @dataclass
    class Config(DataConfig):
        """Settings in addition to those of every data plugin.

        stride: file frames between clip frames; start, crop: "random" or "centre" in training
        (validation uses the centre); captions: "none" or "auto" (a row of captions.csv, else the
        .txt or .caption file of the same name, else a row of metadata.csv or metadata.jsonl);
        missing_caption: "skip" counts the file as unusable, "empty" uses ""; val_fraction:
        fraction of files held out, by a hash of their names, unless there are folders train/ and
        val/; num_prompts: validation captions to sample with.
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
        captions = None if self.cfg.captions == "none" else Captions(root, SIDES)
        found = UsableFiles(root, self.cfg.frames, captions)
        names = self._names(found, name)
        if not names:
            raise DataError(
                f"data.root={self.cfg.root}: no file for {name!r}, {len(found.names)} usable in all"
                f"{found.excluded.summary()}; add files ({', '.join(found.usable)}), or make "
                "folders train/ and val/ in it"
            )
        if name == "train":
            found.excluded.report(self.cfg)
        if (
            captions
            and captions.rows
            and not captions.rows.keys() & {*map(normalised_key, found.names)}
        ):
            raise DataError(
                f"{root / TABLE}: none of its {len(captions.rows)} files is there, such as "
                f"{next(iter(captions.rows))!r}"
            )
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
            outside = len(found.names) - sum(map(len, sides.values()))
            found.excluded.add("clips outside train/ and val/", outside)
            return sides[split]
        return split_by_hash(found.names, str, self.cfg.val_fraction, split)


class UsableFiles:
    """Sorted names of the files below a folder that can give clips, with "/" between folders.

    Follows links. A file with several names counts once, so it cannot be in both splits.
    """

    def __init__(self, root: Path, frames: int, captions: Captions | None) -> None:
        self.excluded = Unused()
        self.usable = usable_endings(frames)
        self.names, others = clip_files(root, frames, self.excluded)
        self._count(others, captions)

    def _count(self, others: list[str], captions: Captions | None) -> None:
        """Counts files that are neither clips nor their captions."""
        texts = {p.as_posix() for name in self.names for p in caption_files(Path(name))}
        tables = captions.tables if captions else set()
        for name in others:
            is_text = PurePosixPath(name).suffix.lower() in ENDINGS
            if captions is None and (name in texts or PurePosixPath(name).name == TABLE):
                self.excluded.add("captions, because data.captions=none")
            elif is_text and name not in texts:
                self.excluded.add("text files without a clip of their name")
            elif name not in texts | tables:
                self.excluded.add_file(name)


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
        """Raises BadItem if there is none, unless `missing_caption` is "empty"."""
        if self.captions is None:
            raise BadItem("has no caption, because data.captions=none")
        text = self.captions(name)
        if not text and self.cfg.missing_caption == "skip":
            raise BadItem("has no caption; data.missing_caption=empty keeps it")
        return text

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        name, cfg = self.names[index], self.cfg
        sample: Sample = {} if self.captions is None else {"caption": self.caption(name)}
        return sample | read_clip(self.root / name, cfg, self.training, rng)
