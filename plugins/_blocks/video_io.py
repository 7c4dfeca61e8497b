"""Reads clips from videos (PyAV) and images, cropped and resized; errors are BadItem."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sandbox.contracts import BadItem
from sandbox.data.image_files import IMAGES, Media, image_size, read_rgb
from sandbox.data.video_files import CONTAINERS as CONTAINERS
from sandbox.data.video_files import OpenVideo, Size, opened, video_size

if TYPE_CHECKING:
    from PIL.Image import Image

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
    """Frames, height and width of an image or video as shown. Raises BadItem."""
    return (1, *image_size(path)) if path.suffix.lower() in IMAGES else video_size(path)


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
    with opened(path) as video:
        if not video.fps:
            raise BadItem("has no frame rate")
        times = video.times
        wanted = [times[i] for i in pick(len(times), video.fps)]
        images = frames_at(video, wanted[0], wanted, resize)
        if len(images) != len(wanted):  # packets without a visible frame, or a seek past the first
            times = [time for time, _ in video.frames(times[0], times[0])]
            wanted = [times[i] for i in pick(len(times), video.fps)]
            images = frames_at(video, times[0], wanted, resize)
        if len(images) != len(wanted):
            raise BadItem("has frames whose times repeat")
        return images, video.fps


def frames_at(video: OpenVideo, start: int, wanted: list[int], resize: Resize) -> list[np.ndarray]:
    """The frames with the times `wanted`; each is resized before the next is decoded."""
    from PIL import Image

    images = []
    for time, frame in video.frames(start, video.times[0]):
        if time in wanted:
            images.append(resize(Image.fromarray(video.image(frame))))
        if time >= wanted[-1]:
            break
    return images
