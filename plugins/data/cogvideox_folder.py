"""A data folder in the format of CogVideoX's official fine-tuning: prompt, video and image lists.

Line i of each list belongs to sample i; paths are relative to the root. The published handling of
frames and sizes is available through settings.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.buckets import nearest
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
    Fit,
    Resize,
    Size,
    media_sizes,
    read_frames,
    read_image,
    to_video,
)
from plugins._configs.buckets import BucketedDataConfig
from sandbox.contracts import (
    BadItem,
    Clip,
    DataError,
    Sample,
    above,
    in_range,
    one_of,
)
from sandbox.registry import register

RESIZES = ("cover", "stretch")


@register("data", "cogvideox_folder")
class CogVideoXFolder:
    """CogVideoX's fine-tuning format: prompts.txt and videos.txt with one line per clip."""

    @dataclass
    class Config(BucketedDataConfig):
        """Settings in addition to those of every data plugin.

        prompts, videos, images: lists, relative to the root; without `images`, image conditions
        use the first frame of the clip. id_token: prefix of every caption, followed by a space.
        resize: "cover" keeps the aspect and crops the centre, "stretch" does not keep it, as
        published. frame_stride: file frames between clip frames; null spreads the frames over the
        video as published (every (number // frames)-th frame from the first). pad_short: repeats
        the last frame of a short video, as published; false makes the video unusable. val_root: a
        second folder of this format for validation; without it `val_fraction` of the videos is
        held out, by a hash of their names.

        With `buckets`, a clip takes the bucket with the most frames that its video has (at
        frame_stride if set; else the fewest), then the nearest aspect, then the nearest size in
        pixels. (By pixels alone, as in the original, videos larger than both would not tell
        480x720 from 720x480.)
        """

        prompts: str = "prompts.txt"
        videos: str = "videos.txt"
        images: str | None = None
        id_token: str = ""
        resize: str = "cover"
        frame_stride: int | None = None
        pad_short: bool = True
        val_root: str | None = None
        val_fraction: float = 0.05
        num_prompts: int = 8

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("resize", self.resize, RESIZES)
            yield from in_range("frame_stride", self.frame_stride, 1)
            yield from above("val_fraction", self.val_fraction, 0, 0.9)
            yield from in_range("num_prompts", self.num_prompts, 0)

        def files(self) -> dict[str, str | None]:
            validation = {} if self.val_root is None else {"val_root": self.val_root}
            return {"root": self.root} | validation

        def provides(self) -> frozenset[str]:
            fields = {"video", "captions"}
            fields |= {"prompts"} if self.num_prompts else set()
            fields |= {"fps", "frame_stride"} if self.frames > 1 else set()
            return frozenset(fields | ({"image"} if self.images is not None else set()))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Samples":
        """Clips of "train" or "val". Raises DataError if there are none or the lists disagree."""
        check_split(name)
        root = folder_of(self.cfg)
        rows = read_rows(root, self.cfg)
        if self.cfg.val_root is not None:
            validation = read_rows(Path(self.cfg.val_root).expanduser(), self.cfg)
            if both := {r.identity for r in rows} & {r.identity for r in validation}:
                shared = next(r for r in validation if r.identity in both)
                raise DataError(
                    f"data.val_root={self.cfg.val_root}: {shared.video} is also in data.root "
                    f"({len(both)} such videos); remove them from one"
                )
            everything = [*rows, *validation]
            rows = rows if name == "train" else validation
        else:
            everything = rows
            names = {r.identity: r.video for r in reversed(rows)}  # one name per file
            rows = split_by_hash(rows, lambda r: names[r.identity], self.cfg.val_fraction, name)
        if not rows:
            raise DataError(f"data.root={self.cfg.root}: no sample for {name!r}; want two or more")
        if name == "train":
            self._unused(root, everything).report(self.cfg)
        return Samples(rows, self.cfg)

    def _unused(self, root: Path, rows: list["Row"]) -> Unused:
        """Videos below the folder, and images where there is a list of them, without a line."""
        endings = (*CONTAINERS, *(IMAGES if self.cfg.images is not None else ()))
        listed = {
            inside(root, str((row.root / name).absolute()))
            for row in rows
            for name in (row.video, row.image)
            if name is not None
        }
        return unlisted(root, {name for name in listed if name}, endings)

    def prompts(self) -> list[str]:
        """Captions of the first validation clips."""
        if not self.cfg.num_prompts:
            return []
        return [row.caption for row in self.split("val").rows[: self.cfg.num_prompts]]


@dataclass(frozen=True)
class Row:
    """One sample; `identity` is the same for all names of its video file."""

    root: Path
    line: int
    caption: str
    video: str
    image: str | None
    name: str
    identity: object


def read_rows(root: Path, cfg: CogVideoXFolder.Config) -> list[Row]:
    """All samples, without lines that are empty in every list, as published.

    Raises DataError if a list is missing, if lists differ in length, and if a line is empty in
    only some of them: captions would move to other clips.
    """
    lists = {"prompts": cfg.prompts, "videos": cfg.videos}
    lists |= {} if cfg.images is None else {"images": cfg.images}
    lines = read_lists(root, lists)
    rows: list[Row] = []
    names: set[str] = set()
    for number, values in enumerate(zip(*lines.values(), strict=True), 1):
        entry = dict(zip(lists, values, strict=True))
        if not any(values):
            continue
        if empty := [name for name, text in entry.items() if not text]:
            full = next(name for name, text in entry.items() if text)
            raise DataError(
                f"data.{empty[0]}={lists[empty[0]]}: line {number} is empty, that of "
                f"data.{full}={lists[full]} is not (in {root}); fix or remove both"
            )
        for kind in lists.keys() & {"videos", "images"}:
            entry[kind] = listed_path(entry[kind], root, lists[kind], number, kind)
        video = entry["videos"]
        name = video if video not in names else f"{video} (line {number})"
        names.add(name)
        caption = f"{cfg.id_token} {entry['prompts']}" if cfg.id_token else entry["prompts"]
        identity = file_identity(root / video)
        rows.append(Row(root, number, caption, video, entry.get("images"), name, identity))
    if rows and not any((root / row.video).is_file() for row in rows):
        raise DataError(
            f"{root / cfg.videos}: none of its {len(rows)} videos is there, such as "
            f"{rows[0].video!r}; paths are relative to the data folder"
        )
    return rows


def read_lists(root: Path, lists: dict[str, str]) -> dict[str, list[str]]:
    """Lines of each list by its setting. Raises DataError if their numbers differ."""
    lines = {name: read_lines(root / file, name) for name, file in lists.items()}
    count = len(lines["videos"])
    for name, found in lines.items():
        if len(found) != count:
            raise DataError(
                f"data.{name}={lists[name]} has {len(found)} lines and "
                f"data.videos={lists['videos']} has {count} (in {root}): line i of each belongs "
                "to sample i"
            )
    return lines


def read_lines(path: Path, setting: str) -> list[str]:
    """Lines without trailing empty ones. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"data.{setting}: {path} cannot be read: {e}; want a list with one line per sample"
        ) from e
    # Not splitlines(): it also splits at characters that a caption may contain.
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def listed_path(name: str, root: Path, file: str, number: int, kind: str) -> str:
    """`name` relative to `root`.

    Raises DataError for a path that leaves the folder or has another file type.
    """
    path, usable = inside(root, name), CONTAINERS if kind == "videos" else IMAGES
    if path is None:
        raise DataError(f"{root / file}, line {number}: {name!r} leaves the data folder")
    if PurePosixPath(path).suffix.lower() not in usable:
        raise DataError(f"{root / file}, line {number}: {name!r}: want {', '.join(usable)}")
    return path


@dataclass
class Samples:
    """The clips of one split, without randomness."""

    rows: list[Row]
    cfg: CogVideoXFolder.Config
    _sizes: list[Size | BadItem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        return printable(self.rows[index].name)

    def content(self, index: int) -> str:
        """SHA-256 of the clip's files and caption. Raises BadItem."""
        row, digest = self.rows[index], hashlib.sha256()
        for name in (row.video, row.image):
            if name is not None:
                try:
                    with (row.root / name).open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as e:
                    raise BadItem(f"{name} cannot be read: {e}") from e
        digest.update(row.caption.encode())
        return digest.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        main, *others = self.cfg.clips()
        if not others:
            return main
        if not self._sizes:  # all in parallel: the loader needs every one
            self._sizes = media_sizes([row.root / row.video for row in self.rows])
        size = self._sizes[index]
        if isinstance(size, BadItem):
            return main
        number, height, width = size
        frames = (number - 1) // (self.cfg.frame_stride or 1) + 1
        return nearest((frames, height, width), (main, *others))

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, cfg = self.rows[index], self.cfg
        clip, stride = self.bucket(index, rng), 1

        def pick(number: int, rate: float) -> list[int]:
            nonlocal stride
            if number < clip.frames and not cfg.pad_short:
                raise BadItem(f"has {number} frames, want {clip.frames}")
            stride = cfg.frame_stride or max(number // clip.frames, 1)
            wanted = [*range(0, number, stride)][: clip.frames]
            if len(wanted) < clip.frames and not cfg.pad_short:
                raise BadItem(f"has {number} frames, too few for frame_stride={stride}")
            return wanted

        images, rate = read_frames(row.root / row.video, pick, resizer(cfg, clip))
        images += [images[-1]] * (clip.frames - len(images))
        sample: Sample = {"video": to_video(images), "caption": row.caption}
        if "fps" in cfg.provides():
            sample |= {"fps": rate / stride, "frame_stride": float(stride)}
        if row.image is not None:
            sample["image"] = read_image(row.root / row.image, resizer(cfg, clip))
        return sample


def resizer(cfg: CogVideoXFolder.Config, clip: Clip) -> Resize:
    """Image -> (height, width, 3) uint8."""
    if cfg.resize == "cover":
        return Fit(clip.height, clip.width, lambda room: room // 2)
    from PIL.Image import Resampling

    return lambda image: np.asarray(image.resize((clip.width, clip.height), Resampling.BICUBIC))
