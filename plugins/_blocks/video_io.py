"""Clips from videos (PyAV) and images (Pillow), cropped and resized; a fault is a BadItem."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from sandbox.contracts import BadItem

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

# Each ending has one container. Nothing is probed, so that a playlist that is called .mp4 opens no
# other file and no address.
CONTAINERS = {".mp4": "mp4", ".webm": "webm", ".gif": "gif"}
IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}

Choose = Callable[[int], int]  # room -> place in [0, room]
Pick = Callable[[int, float], list[int]]  # (frames of the file, fps) -> numbers of frames
Shape = Callable[["Image"], np.ndarray]  # -> (H, W, 3) uint8


def chooser(is_random: bool, rng: np.random.Generator) -> Choose:
    """Places drawn from `rng`, or the middle."""
    return (lambda room: int(rng.integers(room + 1))) if is_random else (lambda room: room // 2)


class Media(Protocol):
    """A file by its path, or bytes that lie in another file."""

    @property
    def suffix(self) -> str: ...
    def open(self, mode: str, /) -> BinaryIO: ...


class Fit:
    """Image -> (height, width, 3) uint8: cuts the largest part of that aspect and resizes it.

    `choose` picks the place of the part once for a clip. Bicubic with antialiasing.
    """

    def __init__(self, height: int, width: int, choose: Choose) -> None:
        self.height, self.width, self.choose = height, width, choose
        self.box: tuple[float, float, float, float] | None = None

    def __call__(self, image: "Image") -> np.ndarray:
        from PIL.Image import Resampling

        if self.box is None:
            scale = min(image.width / self.width, image.height / self.height)
            width, height = self.width * scale, self.height * scale
            # Whole pixels, so that a crop without resizing copies its pixels.
            left, top = (
                self.choose(int(room)) for room in (image.width - width, image.height - height)
            )
            self.box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return np.asarray(image.resize((self.width, self.height), Resampling.BICUBIC, self.box))


def to_video(images: list[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 each -> (3, T, H, W) float32 in [-1, 1]."""
    video = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)
    # Turned around while it is converted, then in place: the plain way takes longer than decoding.
    floats = video.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


def read_image(path: Media, fit: Shape) -> Tensor:
    """(3, 1, H, W) in [-1, 1]. Raises BadItem."""
    from PIL import Image, ImageOps

    try:
        formats = [IMAGES[path.suffix.lower()]]
        with path.open("rb") as file, Image.open(file, formats=formats) as image:
            return to_video([fit(ImageOps.exif_transpose(image).convert("RGB"))])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadItem(f"cannot be read: {e}") from e


def measured(path: Media) -> tuple[int, int, int]:
    """Frames, height and width of a file, of a video by its head and its first frame.

    Raises BadItem.
    """
    if path.suffix.lower() in IMAGES:
        return 1, *image_size(path)
    import av

    try:
        with opened(path) as (container, stream):
            frames = stream.frames or len(packet_times(container, stream))
            container.seek(0)
            first = next(container.decode(stream), None)
            if first is None:
                raise BadItem("has no frame")
            image = first.height, first.width
            return frames, *(image[::-1] if first.rotation % 180 else image)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadItem(f"cannot be decoded: {getattr(e, 'strerror', None) or e}") from e


def all_measured(paths: list[Path]) -> list[tuple[int, int, int] | BadItem]:
    """What `measured` says of each file, or raises."""

    def of(path: Path) -> tuple[int, int, int] | BadItem:
        try:
            return measured(path)
        except BadItem as e:
            return e

    with ThreadPoolExecutor() as pool:
        return [*pool.map(of, paths)]


def image_size(path: Media) -> tuple[int, int]:
    """Height and width as it is shown. Raises BadItem."""
    from PIL import ExifTags, Image

    try:
        formats = [IMAGES[path.suffix.lower()]]
        with path.open("rb") as file, Image.open(file, formats=formats) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if is_turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadItem(f"cannot be read: {e}") from e


def read_video(
    path: Media, frames: int, stride: int, choose: Choose, fit: Fit
) -> tuple[Tensor, float]:
    """(3, frames, H, W) in [-1, 1] and the file's fps.

    The clip is every `stride`-th frame from a start that `choose` picks. Raises BadItem for a file
    that is missing, corrupt, without video or too short.
    """

    def pick(number: int, rate: float) -> list[int]:
        span = (frames - 1) * stride + 1
        if number < span:
            raise BadItem(f"has {number} frames, {span} are needed")
        start = choose(number - span)
        return [*range(start, start + span, stride)]

    images, rate = read_frames(path, pick, fit)
    return to_video(images), rate


def read_frames(path: Media, pick: Pick, fit: Shape) -> tuple[list[np.ndarray], float]:
    """The frames whose numbers `pick` chooses, in order, and the file's fps. Raises BadItem."""
    import av

    try:
        with opened(path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise BadItem("has no frame rate")
            times = packet_times(container, stream)
            wanted = [times[i] for i in pick(len(times), float(rate))]
            found = gather(container, stream, wanted[0], wanted, fit)
            if len(found) != len(wanted):
                # packets that show nothing (VP8), or a seek that went too far
                times = [frame.pts for frame in decoded(container, stream, times[0])]
                wanted = [times[i] for i in pick(len(times), float(rate))]
                found = gather(container, stream, times[0], wanted, fit)
            if len(found) != len(wanted):
                raise BadItem("has frames whose times repeat")
            return found, float(rate)
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadItem(f"cannot be decoded: {getattr(e, 'strerror', None) or e}") from e


@contextmanager
def opened(path: Media) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A file and its first video. Raises BadItem, and what PyAV raises."""
    import av

    with (
        path.open("rb") as file,
        av.open(file, format=CONTAINERS[path.suffix.lower()]) as container,
    ):
        if not container.streams.video:
            raise BadItem("has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadItem("cannot be decoded: its codec is not known")
        stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
        yield container, stream


def packet_times(container: "InputContainer", stream: "VideoStream") -> list[int]:
    """When each frame is shown, in order, from the packets alone: nothing is decoded."""
    times = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    if None in times:
        raise BadItem("has frames without a time")
    return sorted(times)


def gather(
    container: "InputContainer", stream: "VideoStream", seek: int, wanted: list[int], fit: Shape
) -> list[np.ndarray]:
    """The frames that are shown at the times `wanted`, each resized before the next is decoded."""
    found = []
    for frame in decoded(container, stream, seek):
        if frame.pts in wanted:
            image = frame.to_image()
            found.append(
                fit(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            )
        if frame.pts >= wanted[-1]:
            break
    return found


def decoded(
    container: "InputContainer", stream: "VideoStream", seek: int
) -> Iterator["VideoFrame"]:
    """Frames in the order shown, from the last key frame at or before `seek`."""
    container.seek(seek, stream=stream)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise BadItem("has a corrupt frame")
        yield frame
