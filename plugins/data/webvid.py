"""WebVid as DynamiCrafter reads it: a CSV of videos and captions, with a random frame stride."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plugins._blocks.folders import (
    Unused,
    check_split,
    folder_of,
    printable,
    split_by_hash,
    unlisted,
)
from plugins._blocks.video_io import CONTAINERS, read_frames
from sandbox.contracts import BadItem, DataConfig, DataError, Sample, above, in_range, one_of
from sandbox.registry import register

TRANSFORMS = ("resize_center_crop", "center_crop", "resize")
COLUMNS = ("videoid", "page_dir", "name")

Row = dict[str, str]
Randint = Callable[[int, int], int]  # both ends included
Read = Callable[..., tuple[list[np.ndarray], float]]  # (path, pick, resize) -> images, fps


@register("data", "webvid")
class WebVid:
    """Videos of a CSV (videoid, page_dir, name): root/videos/page_dir/videoid.mp4."""

    @dataclass
    class Config(DataConfig):
        """Settings in addition to those of every data plugin.

        meta_path, val_meta_path: CSV files; meta_path null is metadata.csv in the root. Without
        val_meta_path `val_fraction` of the videos is held out, by a hash of their names.
        frame_stride: file frames between clip frames; random_fs draws it between frame_stride_min
        and frame_stride. fixed_fps: scales strides so that clips have about this frame rate.
        fps_max: largest fps condition. antialias: false resizes as torchvision did when the model
        was trained. carry_stride: as published, an unusable video is replaced by the next row,
        keeps its modified stride and is not counted; false draws a stride per clip, and the loader
        counts, lists and replaces unusable videos.
        """

        meta_path: str | None = None
        val_meta_path: str | None = None
        val_fraction: float = 0.05
        frame_stride: int = 1
        frame_stride_min: int = 1
        random_fs: bool = False
        fixed_fps: float | None = None
        fps_max: float | None = None
        spatial_transform: str = "resize_center_crop"
        antialias: bool = True
        carry_stride: bool = False
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from in_range("frame_stride", self.frame_stride, 1)
            yield from in_range("frame_stride_min", self.frame_stride_min, 1)
            if self.frame_stride_min > self.frame_stride:
                yield f"frame_stride_min={self.frame_stride_min}: want <= {self.frame_stride}"
            yield from above("fixed_fps", self.fixed_fps, 0)
            yield from above("fps_max", self.fps_max, 0)
            yield from one_of("spatial_transform", self.spatial_transform, TRANSFORMS)
            yield from in_range("num_prompts", self.num_prompts, 0)

        def files(self) -> dict[str, str | None]:
            tables = {"meta_path": self.meta_path, "val_meta_path": self.val_meta_path}
            return {"root": self.root} | {k: v for k, v in tables.items() if v is not None}

        def provides(self) -> frozenset[str]:
            fields = {"video", "captions", "fps", "frame_stride"}
            return frozenset(fields | ({"prompts"} if self.num_prompts else set()))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Clips":
        """Clips of "train" or "val". Raises DataError if there are none."""
        check_split(name)
        cfg, root = self.cfg, folder_of(self.cfg)
        table = Path(cfg.meta_path).expanduser() if cfg.meta_path else root / "metadata.csv"
        unused = Unused()
        rows = read_rows(table, unused)
        everything = {*map(video_path, rows)}
        if cfg.val_meta_path:
            validation = read_rows(Path(cfg.val_meta_path).expanduser(), unused)
            everything |= {*map(video_path, validation)}
            if both := {video_path(r) for r in rows} & {video_path(r) for r in validation}:
                raise DataError(
                    f"data.val_meta_path={cfg.val_meta_path}: {len(both)} videos are also in "
                    f"{table}, such as {min(both)}; remove them from one"
                )
            rows = rows if name == "train" else validation
        else:
            rows = split_by_hash(rows, video_path, cfg.val_fraction, name)
        if not rows:
            raise DataError(f"{table}: no video for {name!r}; want rows without empty fields")
        if name == "train":
            for reason, count in unlisted(root, everything, CONTAINERS).items():
                unused.add(reason, count)
            unused.report(cfg)
        return Clips(root, rows, cfg, training=name == "train")

    def prompts(self) -> list[str]:
        """Captions of the first validation videos."""
        rows = self.split("val").rows if self.cfg.num_prompts else []
        return [r["name"] for r in rows[: self.cfg.num_prompts]]


def middle(low: int, high: int) -> int:
    """Replaces random draws: the largest stride (low >= 1), the middle start (low = 0)."""
    return high if low else high // 2


def video_path(row: Row) -> str:
    """Path of a video relative to the root."""
    return f"videos/{row['page_dir']}/{row['videoid']}.mp4"


def read_rows(path: Path, unused: Unused | None = None) -> list[Row]:
    """Rows of a CSV; as published, drops rows with an empty field. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            missing = set(COLUMNS) - set(table.fieldnames or [])
            if missing:
                raise DataError(f"{path}: the columns {sorted(missing)} are missing")
            found = [*table]
            rows = [r for r in found if None not in r and all(r.values())]
            if unused is not None:
                unused.add(f"rows of {path.name} with an empty field", len(found) - len(rows))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path} cannot be read: {e}; want a CSV in UTF-8") from e
    if outside := [r for r in rows if ".." in Path(video_path(r)).parts or "/" in r["videoid"]]:
        raise DataError(f"{path}: {video_path(outside[0])} leaves the data folder")
    return rows


class Picker:
    """Picks the frames of a clip; draws `stride` first and modifies it to fit the video."""

    def __init__(self, cfg: WebVid.Config, randint: Randint) -> None:
        self.cfg, self.randint = cfg, randint
        self.stride = cfg.frame_stride
        if cfg.random_fs:
            self.stride = randint(cfg.frame_stride_min, cfg.frame_stride)

    def __call__(self, number: int, rate: float) -> list[int]:
        """Frame numbers of the clip in a video of `number` frames. Raises BadItem."""
        cfg = self.cfg
        if number < cfg.frames:
            raise BadItem(f"has {number} frames, want {cfg.frames}")
        if cfg.fixed_fps:
            self.stride = int(self.stride * rate / cfg.fixed_fps)
        self.stride = max(self.stride, 1)
        span = self.stride * (cfg.frames - 1) + 1
        if number < span:
            if cfg.fixed_fps and number < span * 0.5:
                raise BadItem(f"has {number} frames, want {span} for {cfg.fixed_fps} fps")
            self.stride = number // cfg.frames
            span = self.stride * (cfg.frames - 1) + 1
        room = number - span
        start = self.randint(0, room) if room > 0 else 0
        return [start + self.stride * i for i in range(cfg.frames)]


@dataclass
class Clips:
    """The clips of one split."""

    root: Path
    rows: list[Row]
    cfg: WebVid.Config
    training: bool
    read: Read = read_frames

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return printable(video_path(self.rows[index]))

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """Validation clips have stride `frame_stride` and are in the middle of their video."""
        if self.training:
            return self.draw(index, lambda low, high: int(rng.integers(low, high + 1)))
        return self.draw(index, middle)

    def draw(self, index: int, randint: Randint) -> Sample:
        """The clip that `randint` selects. Raises BadItem."""
        picker = Picker(self.cfg, randint)
        retries = len(self) - 1 if self.cfg.carry_stride and self.training else 0
        for attempt in range(retries):
            try:
                return self._clip(self.rows[(index + attempt) % len(self)], picker)
            except BadItem:
                continue  # as published: the next row, with the modified stride
        return self._clip(self.rows[(index + retries) % len(self)], picker)

    def _clip(self, row: Row, picker: Picker) -> Sample:
        stride = picker.stride

        def pick(number: int, rate: float) -> list[int]:
            picker.stride = stride  # called twice if a file has more packets than frames
            return picker(number, rate)

        images, rate = self.read(self.root / video_path(row), pick, np.asarray)
        fps = rate // picker.stride  # as published: an integer
        return {
            "video": transform(images, self.cfg),
            "caption": row["name"],
            "fps": float(min(fps, self.cfg.fps_max) if self.cfg.fps_max else fps),
            "frame_stride": float(picker.stride),
        }


def transform(images: list[np.ndarray], cfg: WebVid.Config) -> Tensor:
    """(H, W, 3) uint8 each -> (3, T, height, width) float32 in [-1, 1].

    As published: `resize` ignores the aspect ratio; `resize_center_crop` resizes the short side to
    the smaller of height and width, then crops the centre; narrower frames get black bars.
    """
    from torchvision.transforms.v2.functional import center_crop, resize

    frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()  # (T, 3, H, W)
    size = [cfg.height, cfg.width]
    if cfg.spatial_transform != "center_crop":
        scaled = size if cfg.spatial_transform == "resize" else [min(size)]
        frames = resize(frames, scaled, antialias=cfg.antialias)
    frames = center_crop(frames, size)
    return ((frames / 255 - 0.5) * 2).transpose(0, 1).contiguous()
