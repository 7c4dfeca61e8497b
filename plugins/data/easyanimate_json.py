"""EasyAnimateV2's data (June 2024): images and videos, bucketed by aspect and number of frames.

An image or clip takes the bucket with the nearest ratio, is resized to cover it and
centre-cropped; a batch has one size. Three differences from the published code: clips of a batch
have equal numbers of frames instead of being cut to the shortest; random crops are drawn per clip
instead of per batch (identical for batches of one clip); incomplete batches are dropped only with
drop_incomplete=true.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from plugins._blocks.buckets import (
    batch_frames,
    covering_size,
    frame_shares,
    nearest_ratio,
    pick_by_share,
)
from plugins._blocks.folders import (
    Unused,
    check_split,
    file_identity,
    folder_of,
    inside,
    printable,
    split_by_hash,
    unlisted,
)
from plugins._blocks.video_io import (
    CONTAINERS,
    IMAGES,
    Resize,
    media_sizes,
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
NUMBERS = ("width", "height", "frames")  # optional columns: without them files are opened


@register("data", "easyanimate_json")
class EasyAnimateJSON:
    """EasyAnimate's format: a json or csv of images and videos with captions, trained together."""

    @dataclass
    class Config(DataConfig):
        """Settings in addition to those of every data plugin, under published names if any.

        meta_path, val_meta_path: tables; meta_path null is metadata.json or metadata.csv in the
        root. Without val_meta_path `val_fraction` of the files is held out, by a hash of their
        names. Entries have file_path (relative to root), text, type (image or video; as published,
        image if missing) and optionally width, height and frames, so that files need not be opened
        to choose buckets. only: both, image or video; video_repeat: repetitions of each video per
        epoch.

        enable_bucket: buckets by aspect from `ratios` (height / width, from the published table;
        empty: all), scaled so that a square has height x width pixels (image_size for images) and
        rounded down to size_multiple; false gives all clips height x width. A video of L frames
        yields min(frames, 0.8 L) frames, frame_stride file frames apart if it is long enough,
        truncated to a multiple of frame_interval (to 1 if there is none). In training,
        random_ratio_crop draws the ratio, random_frame_crop draws the number of frames, and
        text_drop_ratio is the probability of an empty caption.
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
                yield f"video_repeat={self.video_repeat}: want >= 1; only=image excludes videos"
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
                    f"height={self.height}, width={self.width}: want equal values (the square that "
                    "buckets are scaled to), or enable_bucket=false"
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
            """All clip sizes, images last; the first is the most square one with most frames."""
            counts = range(self.frames, 0, -self.frame_interval) if self.only != "image" else ()
            sizes = [(n, size) for n in (*counts, 1) for size in self.sizes("video").values()]
            sizes = sizes if self.only != "image" else []
            if self.only != "video":
                sizes += [(1, size) for size in self.sizes("image").values()]
            return tuple(dict.fromkeys(Clip(3, frames, *size) for frames, size in sizes))

        def sizes(self, kind: str) -> dict[float, Size]:
            """Ratio -> (height, width) for entries of one kind, most square first."""
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
        """Entries of "train" or "val". Raises DataError if there are none."""
        check_split(name)
        cfg, root = self.cfg, folder_of(self.cfg)
        table = Path(cfg.meta_path).expanduser() if cfg.meta_path else default_table(root)
        rows = read_rows(table, root, cfg)
        files = {row.identity: row.file for row in reversed(rows)}  # one name per file
        if cfg.val_meta_path is not None:
            validation = read_rows(Path(cfg.val_meta_path).expanduser(), root, cfg)
            if shared := [row.file for row in validation if row.identity in files]:
                raise DataError(
                    f"data.val_meta_path={cfg.val_meta_path}: {len(shared)} of its files are also "
                    f"in {table}, such as {shared[0]!r}; remove them from one"
                )
            everything = [*rows, *validation]
            rows = rows if name == "train" else validation
        else:
            everything = rows
            rows = split_by_hash(rows, lambda row: files[row.identity], cfg.val_fraction, name)
        if not rows:
            raise DataError(f"{table}: no entry for {name!r}; want two or more")
        if name == "train":
            self._unused(root, everything, table).report(cfg)
        repeats = cfg.video_repeat if name == "train" else 1
        repeated = [(row, n) for row in rows for n in range(repeats if row.kind == "video" else 1)]
        return Entries(root, repeated, cfg, training=name == "train")

    def _unused(self, root: Path, rows: list["Row"], table: Path) -> Unused:
        only = self.cfg.only
        endings = {"video": CONTAINERS, "image": IMAGES, "both": (*CONTAINERS, *IMAGES)}[only]
        unused = unlisted(root, {row.file for row in rows}, endings)
        if only != "both":
            others = sum(entry.get("type", "image") != only for entry in read_table(table))
            unused.add(f"entries of another type, because data.only={only}", others)
        return unused

    def prompts(self) -> list[str]:
        """Captions of the first validation entries."""
        rows = self.split("val").rows if self.cfg.num_prompts else []
        return [row.text for row, _ in rows[: self.cfg.num_prompts]]


@dataclass(frozen=True)
class Row:
    """One entry: a file relative to the root, its caption, kind, id and columns of NUMBERS.

    `identity` is the same for all names of the file.
    """

    file: str
    text: str
    kind: str
    name: str
    numbers: dict[str, int] = field(hash=False)
    identity: object


def default_table(root: Path) -> Path:
    """metadata.json in the root, else metadata.csv. Raises DataError."""
    for name in ("metadata.json", "metadata.csv"):
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"data.meta_path=null: no metadata.json or metadata.csv in {root}; name a table"
    )


def read_rows(path: Path, root: Path, cfg: EasyAnimateJSON.Config) -> list[Row]:
    """Entries of the kinds in `cfg.only`. Raises DataError for a bad table or entry."""
    names: set[str] = set()
    rows: list[Row] = []
    for number, entry in enumerate(read_table(path), 1):
        row = read_row(entry, f"{path}, entry {number}", root)
        if row.name in names:
            row = replace(row, name=f"{row.file} (entry {number})")
        names.add(row.name)
        rows.append(row)
    chosen = [row for row in rows if cfg.only in ("both", row.kind)]
    if rows and not chosen:
        raise DataError(f"data.only={cfg.only}: none of the {len(rows)} entries of {path} is one")
    if chosen and not any((root / row.file).is_file() for row in chosen):
        raise DataError(
            f"{path}: none of its {len(chosen)} files is there, such as {chosen[0].file!r}; paths "
            f"are relative to data.root={cfg.root}"
        )
    return chosen


def read_table(path: Path) -> list[dict[str, Any]]:
    """Entries of a .json or .csv, each with the required columns. Raises DataError."""
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
                f"{path}, entry {number}: {' and '.join(missing)} missing or not text; there are "
                f"{sorted(map(str, entry))}, want {', '.join(COLUMNS)}, type"
            )
    return found


def read_row(entry: dict[str, Any], where: str, root: Path) -> Row:
    """Raises DataError for a path that leaves the folder, a bad type or bad numbers."""
    kind = entry.get("type", "image")  # as published
    if kind not in KINDS:
        raise DataError(f"{where}: type={kind!r}: want one of {[*KINDS]}")
    file = inside(root, entry["file_path"])
    if file is None:
        raise DataError(f"{where}: {entry['file_path']!r} leaves the data folder {root}")
    path, usable = root / file, IMAGES if kind == "image" else CONTAINERS
    if path.suffix.lower() not in usable:
        why = f"its type is {kind!r}" if "type" in entry else "it has no type, so it is an 'image'"
        raise DataError(f"{where}: {path.name!r}: {why}; want {', '.join(usable)}")
    numbers: dict[str, int] = {}
    for name in (n for n in NUMBERS if entry.get(n) is not None):
        try:
            numbers[name] = int(entry[name])
        except (TypeError, ValueError, OverflowError):
            numbers[name] = 0
        if numbers[name] < 1:
            raise DataError(f"{where}: {name}={entry[name]!r}: want an integer >= 1, or none")
    return Row(file, entry["text"], kind, file, numbers, file_identity(path))


@dataclass
class Entries:
    """One split: entries, each with its repetition number."""

    root: Path
    rows: list[tuple[Row, int]]
    cfg: EasyAnimateJSON.Config
    training: bool
    _sizes: dict[str, tuple[int, int, int] | BadItem] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sizes = {kind: self.cfg.sizes(kind) for kind in KINDS}

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        row, repetition = self.rows[index]
        return printable(row.name) + (f" (again {repetition})" if repetition else "")

    def content(self, index: int) -> str:
        """SHA-256 of the clip's file, caption and table numbers. Raises BadItem."""
        row, _ = self.rows[index]
        try:
            with (self.root / row.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as e:
            raise BadItem(f"cannot be read: {e}") from e
        digest.update(f"{row.text} {row.numbers}".encode())
        return digest.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        """The bucket as published; opens the file only if the table lacks its size."""
        row, cfg = self.rows[index][0], self.cfg
        found = self._size(row)
        frames, height, width = (cfg.frames, 1, 1) if isinstance(found, BadItem) else found
        sizes = self.sizes[row.kind]
        if self.training and cfg.random_ratio_crop:
            shares = {ratio: CROPS[ratio] for ratio in sorted(sizes)}
            size = sizes[pick_by_share(shares, rng.random())]
        else:
            size = sizes[nearest_ratio((height, width), sorted(sizes))]
        if row.kind == "image":
            return Clip(3, 1, *size)
        most = cfg.frames
        if self.training and cfg.random_frame_crop:
            most = pick_by_share(frame_shares(cfg.frames, cfg.frame_interval), rng.random())
        length = usable_frames(frames, cfg.frames)
        return Clip(3, min(most, batch_frames([length], cfg.frame_interval, cfg.frames)), *size)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, cfg = self.rows[index][0], self.cfg
        clip = self.bucket(index, rng)
        if isinstance(size := self._size(row), BadItem):
            raise BadItem(str(size))
        text = row.text
        start = 0.5
        if self.training:
            start = rng.random()
            text = "" if rng.random() < cfg.text_drop_ratio else text
        path, resize = self.root / row.file, cover((clip.height, clip.width))
        if row.kind == "image":
            return {"video": read_image(path, resize), "caption": text}

        def pick(number: int, rate: float) -> list[int]:
            wanted = frame_numbers(number, cfg.frames, cfg.frame_stride, start)[: clip.frames]
            if len(wanted) < clip.frames:
                raise BadItem(f"has {number} frames, too few for {clip.frames}")
            return wanted

        images, _ = read_frames(path, pick, resize)
        return {"video": to_video(images), "caption": text}

    def _size(self, row: Row) -> tuple[int, int, int] | BadItem:
        """Frames, height and width; the first call opens all files that the table lacks."""
        size = self._listed_size(row)
        if size is not None:
            return size
        if not self._sizes:
            files = sorted({r.file for r, _ in self.rows if self._listed_size(r) is None})
            found = media_sizes([self.root / file for file in files])
            self._sizes = dict(zip(files, found, strict=True))
        return self._sizes[row.file]

    def _listed_size(self, row: Row) -> tuple[int, int, int] | None:
        """Frames, height and width from the table; None if it lacks one that is used."""
        numbers = {"frames": 1} | row.numbers if row.kind == "image" else row.numbers
        if not self.cfg.enable_bucket:
            numbers = {"height": 1, "width": 1} | numbers
        if not {"frames", "height", "width"} <= numbers.keys():
            return None
        return numbers["frames"], numbers["height"], numbers["width"]


def usable_frames(length: int, most: int) -> int:
    """Frames of a clip from a video of `length` frames; as published, at most 80 % of it."""
    return min(most, int(length * 0.8))


def frame_numbers(length: int, frames: int, stride: int, position: float) -> list[int]:
    """Frame numbers of a clip, as published: between 9 % and 90 % of the video.

    `position` in [0, 1) chooses the start. Empty if the video is too short for one frame.
    """
    count, end = usable_frames(length, frames), int(length * 0.9)
    if count < 1:
        return []
    span = min(end, (count - 1) * stride + 1)
    low, high = int(end * 0.1), end - span
    low = min(low, high)  # as published: 0 for a clip of length `end`; in between, it raises there
    start = low + int(position * (high - low + 1))
    return np.linspace(start, start + span - 1, count, dtype=int).tolist()


def cover(size: Size) -> Resize:
    """Image -> (height, width, 3) uint8: resized to cover `size` (bilinear), centre-cropped."""
    from PIL.Image import Resampling

    def resize(image: Any) -> np.ndarray:
        rows, columns = covering_size((image.height, image.width), size)
        top, left = round((rows - size[0]) / 2), round((columns - size[1]) / 2)
        resized = np.asarray(image.resize((columns, rows), Resampling.BILINEAR))
        return resized[top : top + size[0], left : left + size[1]]

    return resize
