"""Reads clips from videos (PyAV) and images, cropped and resized; errors are BadItem."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sandbox.contracts import BadItem
from sandbox.data.image_files import IMAGES, Media, image_size, read_rgb

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream
    from PIL.Image import Image

# One container per extension. Formats are not probed: a playlist named .mp4 must not open other
# files or URLs.
CONTAINERS = {".mp4": "mp4", ".webm": "webm", ".gif": "gif"}

Size = tuple[int, int, int]  # frames, height, width
Choose = Callable[[int], int]  # room -> offset in [0, room]
Pick = Callable[[int, float], list[int]]  # (frames of the file, fps) -> frame numbers
Resize = Callable[["Image"], np.ndarray]  # -> (H, W, 3) uint8


def chooser(is_random: bool, rng: np.random.Generator) -> Choose:
    """Offsets drawn from `rng`, or the middle."""
    return (lambda room: int(rng.integers(room + 1))) if is_random else (lambda room: room // 2)


class Fit:
    """Image -> (height, width, 3) uint8: the largest crop of that aspect, resized.

    `choose` picks the offset of the crop once per clip. Bicubic with antialiasing.
    """

    def __init__(self, height: int, width: int, choose: Choose) -> None:
        self.height, self.width, self.choose = height, width, choose
        self.box: tuple[float, float, float, float] | None = None

    def __call__(self, image: "Image") -> np.ndarray:
        from PIL.Image import Resampling

        if self.box is None:
            scale = min(image.width / self.width, image.height / self.height)
            width, height = self.width * scale, self.height * scale
            # Integer offsets: a crop without resizing copies pixels exactly.
            left, top = (
                self.choose(int(room)) for room in (image.width - width, image.height - height)
            )
            self.box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return np.asarray(image.resize((self.width, self.height), Resampling.BICUBIC, self.box))


def to_video(images: list[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 each -> (3, T, H, W) float32 in [-1, 1]."""
    video = torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)
    # Transposed during the conversion, then in place: otherwise slower than decoding.
    floats = video.to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(127.5).sub_(1)


def read_image(path: Media, resize: Resize) -> Tensor:
    """(3, 1, H, W) in [-1, 1]. Raises BadItem."""
    return to_video([resize(read_rgb(path))])


def media_size(path: Media) -> Size:
    """Frames, height and width of an image or video, from its header and first frame.

    Raises BadItem.
    """
    if path.suffix.lower() in IMAGES:
        return 1, *image_size(path)
    from av.error import FFmpegError

    try:
        with opened(path) as (container, stream):
            frames = stream.frames or len(packet_times(container, stream))
            container.seek(0)
            first = next(container.decode(stream), None)
            if first is None:
                raise BadItem("has no frame")
            if first.rotation % 180:
                return frames, first.width, first.height
            return frames, first.height, first.width
    except (FFmpegError, OSError, ValueError) as e:
        raise BadItem(f"cannot be decoded: {getattr(e, 'strerror', None) or e}") from e


def media_sizes(paths: list[Path]) -> list[Size | BadItem]:
    """`media_size` of each file, or its error."""

    def size(path: Path) -> Size | BadItem:
        try:
            return media_size(path)
        except BadItem as e:
            return e

    with ThreadPoolExecutor() as pool:
        return [*pool.map(size, paths)]


def read_video(
    path: Media, frames: int, stride: int, choose: Choose, fit: Fit
) -> tuple[Tensor, float]:
    """(3, frames, H, W) in [-1, 1] and the file's fps.

    The clip is every `stride`-th frame from a start picked by `choose`. Raises BadItem for a
    missing or corrupt file, and for one without video or with too few frames.
    """

    def pick(number: int, rate: float) -> list[int]:
        span = (frames - 1) * stride + 1
        if number < span:
            raise BadItem(f"has {number} frames, want {span}")
        start = choose(number - span)
        return [*range(start, start + span, stride)]

    images, rate = read_frames(path, pick, fit)
    return to_video(images), rate


def read_frames(path: Media, pick: Pick, resize: Resize) -> tuple[list[np.ndarray], float]:
    """The frames whose numbers `pick` returns, in order, and the file's fps. Raises BadItem."""
    from av.error import FFmpegError

    try:
        with opened(path) as (container, stream):
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise BadItem("has no frame rate")
            times = packet_times(container, stream)
            wanted = [times[i] for i in pick(len(times), float(rate))]
            images = frames_at(container, stream, wanted[0], wanted, resize)
            if len(images) != len(wanted):
                # packets without a visible frame (VP8), or a seek past the first frame
                times = [pts for _, pts in decoded(container, stream, times[0])]
                wanted = [times[i] for i in pick(len(times), float(rate))]
                images = frames_at(container, stream, times[0], wanted, resize)
            if len(images) != len(wanted):
                raise BadItem("has frames whose times repeat")
            return images, float(rate)
    except (FFmpegError, OSError, ValueError) as e:
        raise BadItem(f"cannot be decoded: {getattr(e, 'strerror', None) or e}") from e


@contextmanager
def opened(path: Media) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A file and its first video stream. Raises BadItem and PyAV's errors."""
    import av

    with (
        path.open("rb") as file,
        av.open(file, mode="r", format=CONTAINERS[path.suffix.lower()]) as container,
    ):
        if not container.streams.video:
            raise BadItem("has no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BadItem("cannot be decoded: its codec is not known")
        stream.codec_context.thread_count = 1  # the loader's workers run in parallel
        yield container, stream


def packet_times(container: "InputContainer", stream: "VideoStream") -> list[int]:
    """Sorted presentation times (pts) of all frames, from packets, without decoding."""
    times = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
    known = [pts for pts in times if pts is not None]
    if len(known) != len(times):
        raise BadItem("has frames without a time")
    return sorted(known)


def frames_at(
    container: "InputContainer", stream: "VideoStream", seek: int, wanted: list[int],
    resize: Resize,
) -> list[np.ndarray]:  # fmt: skip
    """The frames with the times `wanted`; each is resized before the next is decoded."""
    images = []
    for frame, pts in decoded(container, stream, seek):
        if pts in wanted:
            image = frame.to_image()
            images.append(
                resize(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            )
        if pts >= wanted[-1]:
            break
    return images


def decoded(
    container: "InputContainer", stream: "VideoStream", seek: int
) -> Iterator[tuple["VideoFrame", int]]:
    """Frames and their times (pts) in display order, from the last key frame up to `seek`."""
    container.seek(seek, stream=stream)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise BadItem("has a corrupt frame")
        if frame.pts is None:
            raise BadItem("has frames without a time")
        yield frame, frame.pts
