"""The data of EasyAnimateV2 (June 2024): images and videos in sizes by aspect and frames.

A picture or clip goes to the size whose ratio is nearest, is resized to cover it and cropped in the
middle; batches have one size. As published but for three things: a batch's number of frames is that
of each of its clips, not the least; a random crop is drawn for each clip, not for each batch (which
are the same for batches of one clip); and batches of what is left are not dropped by themselves.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from plugins._blocks.buckets import batch_frames, covering, frame_shares, nearest_ratio, picked
from plugins._blocks.folders import folder_of, held_out, identity
from plugins._blocks.video_io import (
    CONTAINERS,
    IMAGES,
    Shape,
    all_measured,
    read_frames,
    read_image,
    to_video,
)
from plugins._configs.buckets import ASPECTS, CROPS, crop_size
from sandbox.contracts import (
    BadItem,
    Clip,
    DataConfig,
    DataError,
    Sample,
    above,
    in_range,
    one_of,
)
from sandbox.registry import register

Size = tuple[int, int]  # height, width in pixels

KINDS = ("image", "video")
COLUMNS = ("file_path", "text")
NUMBERS = ("width", "height", "frames")  # columns that spare a look into the file


@register("data", "easyanimate_json")
class EasyAnimateJSON:
    """A json or csv of images and videos with captions, as EasyAnimate trains on them together."""

    @dataclass
    class Config(DataConfig):
        """The settings beyond those of every data plugin, with published names where there are any.

        meta_path, val_meta_path: tables below or beside `root`; meta_path null is metadata.json or
        metadata.csv in it, and without val_meta_path `val_fraction` of the files is held out, by
        the hash of their names. Entries have file_path (below root), text, type (image or video; as
        published an image where it is missing) and, to spare a look into each file, width, height
        and frames. only: both, image or video; video_repeat: how often an epoch has each video.

        enable_bucket: sizes by aspect, of `ratios` (height / width, of the published table; empty:
        all), scaled so that a square has height x width pixels (image_size of images) and rounded
        down to size_multiple; without it all have height x width. A video of L frames gives
        min(frames, 0.8 L), frame_stride file frames apart where it is long enough, cut to a
        multiple of frame_interval, or to 1 where that is none. While training, random_ratio_crop
        draws the ratio, random_frame_crop the number of frames, and text_drop_ratio of the captions
        become empty.
        """

        meta_path: str | None = None
        val_meta_path: str | None = None
        val_fraction: float = 0.05
        only: str = "both"
        video_repeat: int = 1
        frame_stride: int = 1
        frame_interval: int = 9
        enable_bucket: bool = True
        ratios: tuple[float, ...] = ()
        image_size: int | None = None
        size_multiple: int = 8
        random_ratio_crop: bool = False
        random_frame_crop: bool = False
        text_drop_ratio: float = 0.0
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from one_of("only", self.only, ("both", *KINDS))
            if not self.video_repeat >= 1:
                yield f"video_repeat={self.video_repeat}: want >= 1; only=image leaves out videos"
            for name in ("frame_stride", "frame_interval", "image_size", "size_multiple"):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("text_drop_ratio", self.text_drop_ratio, 0, 1)
            yield from in_range("num_prompts", self.num_prompts, 0)
            table = CROPS if self.random_ratio_crop else ASPECTS
            for ratio in self.ratios:
                yield from one_of("ratios", ratio, table)
            step, frames = self.frame_interval, self.frames
            if step > 0 and frames > 1 and frames % step:
                near = [n for n in (frames // step * step, -(-frames // step) * step) if n]
                yield (
                    f"frames={frames}: want 1 or a multiple of frame_interval={step}, such as "
                    f"{' or '.join(map(str, near))}"
                )
            if self.enable_bucket and self.height != self.width:
                yield (
                    f"height={self.height}, width={self.width}: want equal ones, of which a square "
                    "has as many pixels, or enable_bucket=false"
                )
            if self.random_ratio_crop and not self.enable_bucket:
                yield "random_ratio_crop=true: want enable_bucket=true"

        def files(self) -> dict[str, str | None]:
            tables = {"meta_path": self.meta_path, "val_meta_path": self.val_meta_path}
            return {"root": self.root} | {k: v for k, v in tables.items() if v is not None}

        def provides(self) -> frozenset[str]:
            fields = {"video", "captions"} | ({"prompts"} if self.num_prompts else set())
            return frozenset(fields)

        def clips(self) -> tuple[Clip, ...]:
            """All sizes of clips, images last; the first is the most square one of all frames."""
            counts = range(self.frames, 0, -self.frame_interval) if self.only != "image" else ()
            sizes = [(n, size) for n in (*counts, 1) for size in self.sizes("video").values()]
            sizes = sizes if self.only != "image" else []
            if self.only != "video":
                sizes += [(1, size) for size in self.sizes("image").values()]
            return tuple(dict.fromkeys(Clip(3, frames, *size) for frames, size in sizes))

        def sizes(self, kind: str) -> dict[float, Size]:
            """Height and width by ratio, from the most square one on; of one kind of entries."""
            base = (self.image_size if kind == "image" else None) or self.height
            if not self.enable_bucket:
                return {1.0: (base, base if kind == "image" and self.image_size else self.width)}
            table, least = CROPS if self.random_ratio_crop else ASPECTS, self.size_multiple
            ratios = sorted(self.ratios or table, key=lambda ratio: abs(ratio - 1))
            crops = {ratio: crop_size(ratio, base) for ratio in ratios}
            return {
                ratio: (max(rows // least, 1) * least, max(columns // least, 1) * least)
                for ratio, (rows, columns) in crops.items()
            }

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Entries":
        """Entries of "train" or "val". Raises DataError where there are none."""
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        cfg, root = self.cfg, folder_of(self.cfg)
        table = Path(cfg.meta_path).expanduser() if cfg.meta_path else default_table(root)
        rows = read_rows(table, root, cfg)
        files = {identity(root / row.file): row.file for row in reversed(rows)}
        if cfg.val_meta_path is not None:
            other = read_rows(Path(cfg.val_meta_path).expanduser(), root, cfg)
            shared = [r.file for r in other if identity(root / r.file) in files]
            if shared:
                raise DataError(
                    f"data.val_meta_path={cfg.val_meta_path}: {len(shared)} of its files are in "
                    f"{table}, too, such as {shared[0]!r}; remove them from one"
                )
            rows = rows if name == "train" else other
        else:
            held = held_out(sorted(set(files.values())), cfg.val_fraction)
            rows = [r for r in rows if (files[identity(root / r.file)] in held) == (name == "val")]
        if not rows:
            raise DataError(f"{table}: no entry for {name!r}; want two or more")
        repeats = cfg.video_repeat if name == "train" else 1
        rows = [(row, n) for row in rows for n in range(repeats if row.kind == "video" else 1)]
        return Entries(root, rows, cfg, training=name == "train")

    def prompts(self) -> list[str]:
        """Captions of the first entries of the validation split."""
        rows = self.split("val").rows if self.cfg.num_prompts else []
        return [row.text for row, _ in rows[: self.cfg.num_prompts]]


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One entry: a file below the root, its caption, what it is, and what the table says of it."""

    file: str
    text: str
    kind: str
    name: str
    numbers: dict[str, int] = field(hash=False)


def default_table(root: Path) -> Path:
    """metadata.json in the root, else metadata.csv. Raises DataError."""
    for name in ("metadata.json", "metadata.csv"):
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"data.meta_path=null: no metadata.json or metadata.csv in {root}; name a table"
    )


def read_rows(path: Path, root: Path, cfg: EasyAnimateJSON.Config) -> list[Row]:
    """Entries of the kinds that are asked for. Raises DataError for a bad table or entry."""
    names: set[str] = set()
    rows: list[Row] = []
    for number, entry in enumerate(read_table(path), 1):
        row = read_row(entry, f"{path}, entry {number}", root)
        if row.name in names:
            row = Row(row.file, row.text, row.kind, f"{row.file} (entry {number})", row.numbers)
        names.add(row.name)
        rows.append(row)
    asked = [row for row in rows if cfg.only in ("both", row.kind)]
    if rows and not asked:
        raise DataError(f"data.only={cfg.only}: none of the {len(rows)} entries of {path} is one")
    if asked and not any((root / row.file).is_file() for row in asked):
        raise DataError(
            f"{path}: none of its {len(asked)} files is there, such as {asked[0].file!r}; paths "
            f"are below data.root={cfg.root}"
        )
    return asked


def read_table(path: Path) -> list[dict[str, Any]]:
    """Entries of a .json or .csv, each with the columns it must have. Raises DataError."""
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                found = [
                    {k: v for k, v in row.items() if v or k == "text"}
                    for row in csv.DictReader(lines, strict=True)
                ]
        else:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a table in JSON or CSV, UTF-8") from e
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{path}: want a list of entries such as {{file_path, text, type}}")
    for number, entry in enumerate(found, 1):
        if missing := [name for name in COLUMNS if not isinstance(entry.get(name), str)]:
            raise DataError(
                f"{path}, entry {number}: {' and '.join(missing)} missing or no text; there are "
                f"{sorted(map(str, entry))}, want {', '.join(COLUMNS)}, type"
            )
    return found


def read_row(entry: dict[str, Any], where: str, root: Path) -> Row:
    """Raises DataError for a path that leaves the folder, a bad type and bad numbers."""
    kind = entry.get("type", "image")  # as published
    if kind not in KINDS:
        raise DataError(f"{where}: type={kind!r}: want one of {[*KINDS]}")
    path = root / PurePosixPath(entry["file_path"])
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        raise DataError(f"{where}: {entry['file_path']!r} leaves the folder of the data, {root}")
    usable = IMAGES if kind == "image" else CONTAINERS
    if path.suffix.lower() not in usable:
        said = f"its type is {kind!r}" if "type" in entry else "it has no type, so it is an 'image'"
        raise DataError(f"{where}: {path.name!r}: {said}; want {', '.join(usable)}")
    numbers: dict[str, int] = {}
    for name in (n for n in NUMBERS if entry.get(n) is not None):
        try:
            numbers[name] = int(entry[name])
        except (TypeError, ValueError, OverflowError):
            numbers[name] = 0
        if numbers[name] < 1:
            raise DataError(f"{where}: {name}={entry[name]!r}: want a whole number >= 1, or none")
    file = path.relative_to(root).as_posix()
    return Row(file, entry["text"], kind, file, numbers)


# --- clips ----------------------------------------------------------------------------------------


@dataclass
class Entries:
    """One split: entries, each with the number of its repetition."""

    root: Path
    rows: list[tuple[Row, int]]
    cfg: EasyAnimateJSON.Config
    training: bool
    _looks: dict[str, tuple[int, int, int] | BadItem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = {kind: self.cfg.sizes(kind) for kind in KINDS}

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        """The path below the root, with what cannot be printed escaped."""
        row, repetition = self.rows[index]
        return repr(row.name)[1:-1] + (f" (again {repetition})" if repetition else "")

    def content(self, index: int) -> str:
        """SHA-256 of all that is read for a clip: the bytes of its file, and its caption."""
        row, _ = self.rows[index]
        try:
            with (self.root / row.file).open("rb") as file:
                found = hashlib.file_digest(file, "sha256")
        except OSError as e:
            raise BadItem(f"cannot be read: {e}") from e
        found.update(f"{row.text} {row.numbers}".encode())
        return found.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        """As published; the file is looked into where the table does not say what it needs."""
        row, cfg = self.rows[index][0], self.cfg
        look = self._look(row)
        frames, *source = (cfg.frames, 1, 1) if isinstance(look, BadItem) else look
        sizes = self.sizes[row.kind]
        if self.training and cfg.random_ratio_crop:
            shares = {ratio: CROPS[ratio] for ratio in sorted(sizes)}
            size = sizes[picked(shares, rng.random())]
        else:
            size = sizes[nearest_ratio((source[0], source[1]), sorted(sizes))]
        if row.kind == "image":
            return Clip(3, 1, *size)
        most = cfg.frames
        if self.training and cfg.random_frame_crop:
            most = picked(frame_shares(cfg.frames, cfg.frame_interval), rng.random())
        length = usable_frames(frames, cfg.frames)
        return Clip(3, min(most, batch_frames([length], cfg.frame_interval, cfg.frames)), *size)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, cfg = self.rows[index][0], self.cfg
        clip = self.bucket(index, rng)
        if isinstance(look := self._look(row), BadItem):
            raise BadItem(str(look))
        text = row.text
        place = 0.5
        if self.training:
            place = rng.random()
            text = "" if rng.random() < cfg.text_drop_ratio else text
        path, shape = self.root / row.file, covered((clip.height, clip.width))
        if row.kind == "image":
            return {"video": read_image(path, shape), "caption": text}

        def pick(number: int, rate: float) -> list[int]:
            wanted = frame_numbers(number, cfg.frames, cfg.frame_stride, place)[: clip.frames]
            if len(wanted) < clip.frames:
                raise BadItem(f"has {number} frames, too few for {clip.frames}")
            return wanted

        images, _ = read_frames(path, pick, shape)
        return {"video": to_video(images), "caption": text}

    def _look(self, row: Row) -> tuple[int, int, int] | BadItem:
        """Frames, height and width; all files that must be opened for it are, at the first call."""
        told = self._told(row)
        if told is not None:
            return told
        if not self._looks:
            files = sorted({r.file for r, _ in self.rows if self._told(r) is None})
            found = all_measured([self.root / file for file in files])
            self._looks = dict(zip(files, found, strict=True))
        return self._looks[row.file]

    def _told(self, row: Row) -> tuple[int, int, int] | None:
        """What the table says, where that is enough."""
        told = {"frames": 1} | row.numbers if row.kind == "image" else row.numbers
        if not self.cfg.enable_bucket:
            told = {"height": 1, "width": 1} | told
        if not {"frames", "height", "width"} <= told.keys():
            return None
        return told["frames"], told["height"], told["width"]


def usable_frames(length: int, most: int) -> int:
    """Frames of a clip of a video of `length` frames; as published, of four fifths of it."""
    return min(most, int(length * 0.8))


def frame_numbers(length: int, frames: int, stride: int, place: float) -> list[int]:
    """Numbers of a clip's frames, as published: from the last nine tenths of the first nine tenths.

    `place` in [0, 1) chooses the start. Empty for a video that is too short for one frame.
    """
    count, end = usable_frames(length, frames), int(length * 0.9)
    if count < 1:
        return []
    span = min(end, (count - 1) * stride + 1)
    low, high = int(end * 0.1), end - span
    low = min(low, high)  # as published 0 for a clip of the whole end, and an error between them
    start = low + int(place * (high - low + 1))
    return np.linspace(start, start + span - 1, count, dtype=int).tolist()


def covered(size: Size) -> Shape:
    """Image -> (height, width, 3) uint8: resized to cover `size` (bilinear), cut in the middle."""
    from PIL.Image import Resampling

    def shape(image: Any) -> np.ndarray:
        rows, columns = covering((image.height, image.width), size)
        top, left = round((rows - size[0]) / 2), round((columns - size[1]) / 2)
        resized = np.asarray(image.resize((columns, rows), Resampling.BILINEAR))
        return resized[top : top + size[0], left : left + size[1]]

    return shape
