"""A folder of videos and images with captions in `.txt` files beside them or in a captions.csv."""

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.folders import folder_of, held_out, identity, walk
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
        """The settings beyond those of every data plugin.

        stride: file frames from one frame to the next; start, crop: "random" or "centre", for
        training (validation takes the centre); captions: "auto" (a row of captions.csv, else the
        .txt file beside the video) or "none"; missing_caption: "skip" counts the file as bad,
        "empty" makes it ""; val_fraction: part of the files that is kept from training, by a hash
        of their names, unless there are folders train/ and val/; num_prompts: captions of the
        validation split to sample with.
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
        """Clips of "train" or "val". Raises DataError where there are none, or no such folder."""
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        root = folder_of(self.cfg)
        found = Listing(root, self.cfg.frames)
        train, val = self._sides(found)
        names = train if name == "train" else val
        if not names:
            raise DataError(
                f"data.root={self.cfg.root}: no file for {name!r}, {len(found.names)} usable in all"
                f"{found.left_out()}; add files, or make folders train/ and val/ in it"
            )
        if found.excluded and name == "train":
            log.warning("data.root=%s: left out%s", self.cfg.root, found.left_out())
        table = None if self.cfg.captions == "none" else Captions(root, found.names, self.cfg)
        return Files(
            root, names, self.cfg, table, training=name == "train", excluded=found.excluded
        )

    def prompts(self) -> list[str]:
        """Captions of the first files of the validation split that have one."""
        if "prompts" not in self.cfg.provides():
            return []
        val = self.split("val")
        found: list[str] = []
        for name in val.names:
            if len(found) == self.cfg.num_prompts:
                break
            try:
                found.append(val.captions(name))
            except BadItem:
                continue  # it is counted where the split is loaded
        return found

    def _sides(self, found: "Listing") -> tuple[list[str], list[str]]:
        """Names of the two splits."""
        train = [n for n in found.names if n.startswith("train/")]
        val = [n for n in found.names if n.startswith("val/")]
        if train and val:
            return train, val
        held = held_out(found.names, self.cfg.val_fraction)
        return [n for n in found.names if n not in held], [n for n in found.names if n in held]


class Listing:
    """The files below a folder that can give clips, by their names below it ("/" between), sorted.

    Links are followed. A file that has several names counts once, so that it cannot be on both
    sides of the split.
    """

    def __init__(self, root: Path, frames: int) -> None:
        self.names: list[str] = []
        self.excluded: dict[str, int] = {}  # why files were left out, and how many
        usable = set(CONTAINERS) | (set(IMAGES) if frames == 1 else set())
        seen: set[object] = set()
        for name in sorted(walk(root)):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in usable:
                if (same := identity(root / name)) in seen:
                    self._exclude("second names of a file")
                else:
                    seen.add(same)
                    self.names.append(name)
            elif suffix in IMAGES:
                self._exclude(f"images, because data.frames={frames}")

    def left_out(self) -> str:
        return "".join(f", {n} {why}" for why, n in self.excluded.items())

    def _exclude(self, why: str) -> None:
        self.excluded[why] = self.excluded.get(why, 0) + 1


class Captions:
    """Name -> caption: a row of captions.csv (in the root, train/ or val/), else the .txt file."""

    def __init__(self, root: Path, names: list[str], cfg: VideoFolder.Config) -> None:
        self.root, self.missing = root, cfg.missing_caption
        self.rows: dict[str, str] = {}
        for folder in ("", "train/", "val/"):
            path = root / folder / TABLE
            if path.is_file():
                self.rows |= {folder + file: text for file, text in read_table(path).items()}
        if self.rows and not self.rows.keys() & set(names):
            first = next(iter(self.rows))
            raise DataError(
                f"{root / TABLE}: none of its {len(self.rows)} files is there, such as {first!r}"
            )

    def __call__(self, name: str) -> str:
        """Raises BadItem where the file has none and those are to be skipped."""
        text = self.rows.get(name) or self._beside(name)
        if not text and self.missing == "skip":
            raise BadItem("has no caption (data.missing_caption=empty would take it)")
        return text

    def _beside(self, name: str) -> str:
        path = (self.root / name).with_suffix(".txt")
        try:
            return one_line(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as e:
            raise BadItem(f"its caption {path.name} cannot be read: {e}") from e


def read_table(path: Path) -> dict[str, str]:
    """File (a name below the CSV's folder) -> caption, from columns of these names.

    Raises DataError for a broken table, and where a file has two captions.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, strict=True)
            columns = table.fieldnames or []
            if not {"file", "caption"} <= set(columns):
                raise DataError(f"{path}: want the columns file and caption, there are {columns}")
            rows: dict[str, str] = {}
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {table.line_num}: want {len(columns)} entries; quote commas"
                    )
                file = PurePosixPath(row["file"].strip()).as_posix()
                if rows.setdefault(file, one_line(row["caption"])) != one_line(row["caption"]):
                    raise DataError(
                        f"{path}, line {table.line_num}: {file!r} has two captions; remove one"
                    )
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a CSV in UTF-8") from e


def one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass
class Files:
    """The clips of one split. A clip and its caption are found by the same name, below `root`."""

    root: Path
    names: list[str]
    cfg: VideoFolder.Config
    captions: Captions | None
    training: bool
    excluded: dict[str, int]  # why files were left out, and how many

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        """The name, with what cannot be printed escaped."""
        return repr(self.names[index])[1:-1]

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        name, cfg = self.names[index], self.cfg
        path = self.root / name
        sample: Sample = {} if self.captions is None else {"caption": self.captions(name)}
        fit = Fit(cfg.height, cfg.width, chooser(self.training and cfg.crop == "random", rng))
        if path.suffix.lower() in IMAGES:
            return sample | {"video": read_image(path, fit)}
        start = chooser(self.training and cfg.start == "random", rng)
        video, rate = read_video(path, cfg.frames, cfg.stride, start, fit)
        if cfg.frames > 1:
            sample |= {"fps": rate / cfg.stride, "frame_stride": float(cfg.stride)}
        return sample | {"video": video}
