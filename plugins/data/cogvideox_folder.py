"""A folder as CogVideoX's official fine-tuning reads it: lists of prompts, videos and images.

Line i of each list belongs to sample i; paths are below the root. What the published reader does
with frames and sizes is a setting where it is not the default.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from plugins._blocks.buckets import nearest
from plugins._blocks.folders import folder_of, held_out, identity
from plugins._blocks.video_io import (
    CONTAINERS,
    IMAGES,
    Fit,
    Shape,
    all_measured,
    read_frames,
    read_image,
)
from plugins._blocks.video_io import to_video as stacked
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
    """prompts.txt and videos.txt, a line for each clip, as CogVideoX's fine-tuning has them."""

    @dataclass
    class Config(BucketedDataConfig):
        """The settings beyond those of every data plugin.

        prompts, videos, images: lists below the root; without `images` what needs a picture takes
        the first frame of the clip. id_token: put in front of every caption, with a space. resize:
        "cover" keeps the aspect (the centre is cut out), "stretch" does not, as published.
        frame_stride: file frames from one frame to the next; null spreads them over the video as
        published, every (number // frames)-th from the first on. pad_short: a short video's last
        frame is repeated, as published; else the video is unusable. val_root: a second folder of
        this kind to validate on; without it `val_fraction` of the videos is held out, by the hash
        of their names.

        With `buckets` a clip goes to the most frames that its video has, frame_stride apart where
        that is set (else to the fewest), and among the sizes with so many to the one whose aspect
        is nearest, then to the nearest in pixels. (By pixels alone, as in the original, a video
        that is larger than both goes to 480x720 as well as to 720x480.)
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
            other = {} if self.val_root is None else {"val_root": self.val_root}
            return {"root": self.root} | other

        def provides(self) -> frozenset[str]:
            fields = {"video", "captions"}
            fields |= {"prompts"} if self.num_prompts else set()
            fields |= {"fps", "frame_stride"} if self.frames > 1 else set()
            return frozenset(fields | ({"image"} if self.images is not None else set()))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, name: str) -> "Samples":
        """Clips of "train" or "val". Raises DataError where there are none or lists disagree."""
        if name not in ("train", "val"):
            raise ValueError(f"split {name!r}: want 'train' or 'val'")
        rows = read_rows(folder_of(self.cfg), self.cfg)
        if self.cfg.val_root is not None:
            other = read_rows(Path(self.cfg.val_root).expanduser(), self.cfg)
            if both := {r.same for r in rows} & {r.same for r in other}:
                shared = next(r for r in other if r.same in both)
                raise DataError(
                    f"data.val_root={self.cfg.val_root}: {shared.video} is in data.root, too "
                    f"({len(both)} such videos); remove them from one"
                )
            rows = rows if name == "train" else other
        else:
            first = {r.same: r.video for r in reversed(rows)}  # one name for each file
            held = held_out(sorted(set(first.values())), self.cfg.val_fraction)
            rows = [r for r in rows if (first[r.same] in held) == (name == "val")]
        if not rows:
            raise DataError(f"data.root={self.cfg.root}: no sample for {name!r}; want two or more")
        return Samples(rows, self.cfg)

    def prompts(self) -> list[str]:
        """Captions of the first clips of the validation split."""
        if not self.cfg.num_prompts:
            return []
        return [row.caption for row in self.split("val").rows[: self.cfg.num_prompts]]


@dataclass(frozen=True)
class Row:
    """One sample: its files, where the lists name it, and what its video file is."""

    root: Path
    line: int
    caption: str
    video: str
    image: str | None
    name: str
    same: object


def read_rows(root: Path, cfg: CogVideoXFolder.Config) -> list[Row]:
    """All samples. Raises DataError where a list is missing, or two of them do not agree.

    Lines that are empty in every list are passed over, as published; one that is empty in some of
    them would move captions to other clips, and is an error.
    """
    lists = {"prompts": cfg.prompts, "videos": cfg.videos}
    lists |= {} if cfg.images is None else {"images": cfg.images}
    lines = {name: read_lines(root / file, name) for name, file in lists.items()}
    of_videos = len(lines["videos"])
    for name, found in lines.items():
        if len(found) != of_videos:
            raise DataError(
                f"data.{name}={lists[name]} has {len(found)} lines and data.videos={cfg.videos} "
                f"has {of_videos} (in {root}): line i of each belongs to sample i"
            )
    rows: list[Row] = []
    names: set[str] = set()
    for line in range(of_videos):
        entry = {name: found[line] for name, found in lines.items()}
        if not any(entry.values()):
            continue
        if empty := [name for name, text in entry.items() if not text]:
            full = next(name for name, text in entry.items() if text)
            raise DataError(
                f"data.{empty[0]}={lists[empty[0]]}: line {line + 1} is empty, that of "
                f"data.{full}={lists[full]} is not (in {root}); mend or remove both"
            )
        for kind in ("videos", "images"):
            check_path(entry.get(kind), root / lists.get(kind, ""), line, kind)
        video = PurePosixPath(entry["videos"]).as_posix()
        name = video if video not in names else f"{video} (line {line + 1})"
        names.add(name)
        caption = f"{cfg.id_token} {entry['prompts']}" if cfg.id_token else entry["prompts"]
        same = identity(root / video)
        rows.append(Row(root, line + 1, caption, video, entry.get("images"), name, same))
    if rows and not any((root / row.video).is_file() for row in rows):
        raise DataError(
            f"{root / cfg.videos}: none of its {len(rows)} videos is there, such as "
            f"{rows[0].video!r}; paths are below the folder of the data"
        )
    return rows


def read_lines(path: Path, setting: str) -> list[str]:
    """Lines without the empty ones at the end. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"data.{setting}: {path} cannot be read: {e}; want a list, one line for each sample"
        ) from e
    # Not splitlines(): a caption may hold characters that it takes for the end of a line.
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def check_path(name: str | None, file: Path, line: int, kind: str) -> None:
    """Raises DataError for a path that leaves the folder or is of another kind of file."""
    if name is None:
        return
    path, usable = PurePosixPath(name), CONTAINERS if kind == "videos" else IMAGES
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{file}, line {line + 1}: {name!r} leaves the folder of the data")
    if path.suffix.lower() not in usable:
        raise DataError(f"{file}, line {line + 1}: {name!r}: want {', '.join(usable)}")


@dataclass
class Samples:
    """The clips of one split; nothing is random."""

    rows: list[Row]
    cfg: CogVideoXFolder.Config
    _looks: list[tuple[int, int, int] | BadItem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        """The video's path below the root, with what cannot be printed escaped."""
        return repr(self.rows[index].name)[1:-1]

    def content(self, index: int) -> str:
        """SHA-256 of all that is read for a clip: the bytes of its files, and its caption."""
        row, found = self.rows[index], hashlib.sha256()
        for name in (row.video, row.image):
            if name is not None:
                try:
                    with (row.root / name).open("rb") as file:
                        found.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as e:
                    raise BadItem(f"{name} cannot be read: {e}") from e
        found.update(row.caption.encode())
        return found.hexdigest()

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        main, *others = self.cfg.clips()
        if not others:
            return main
        if not self._looks:  # all at once, as all are asked for
            self._looks = all_measured([row.root / row.video for row in self.rows])
        look = self._looks[index]
        if isinstance(look, BadItem):
            return main
        number, *size = look  # of frames, of which a clip has every so many
        apart = (number - 1) // (self.cfg.frame_stride or 1) + 1
        return nearest((apart, size[0], size[1]), (main, *others))

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        row, cfg = self.rows[index], self.cfg
        clip, stride = self.bucket(index, rng), 1

        def pick(number: int, rate: float) -> list[int]:
            nonlocal stride
            if number < clip.frames and not cfg.pad_short:
                raise BadItem(f"has {number} frames, {clip.frames} are needed")
            stride = cfg.frame_stride or max(number // clip.frames, 1)
            wanted = [*range(0, number, stride)][: clip.frames]
            if len(wanted) < clip.frames and not cfg.pad_short:
                raise BadItem(f"has {number} frames, too few for frame_stride={stride}")
            return wanted

        images, rate = read_frames(row.root / row.video, pick, shape(cfg, clip))
        images += [images[-1]] * (clip.frames - len(images))
        sample: Sample = {"video": stacked(images), "caption": row.caption}
        if "fps" in cfg.provides():
            sample |= {"fps": rate / stride, "frame_stride": float(stride)}
        if row.image is not None:
            sample["image"] = read_image(row.root / row.image, shape(cfg, clip))
        return sample


def shape(cfg: CogVideoXFolder.Config, clip: Clip) -> Shape:
    """Image -> (height, width, 3) uint8."""
    if cfg.resize == "cover":
        return Fit(clip.height, clip.width, lambda room: room // 2)
    from PIL.Image import Resampling

    return lambda image: np.asarray(image.resize((clip.width, clip.height), Resampling.BICUBIC))
