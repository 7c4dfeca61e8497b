"""Video files for task=prepare: metadata, and the frames of a time span (PyAV).

Times are presentation times in seconds from the first frame, rounded to microseconds, so that
variable frame rates work. An unusable file raises BadItem.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sandbox.contracts import BadItem, VideoFile
from sandbox.storage.atomic import digest_of

# Each suffix has one container. Nothing is probed: a playlist named .mp4 cannot open other files
# or URLs.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska",
              ".avi": "avi", ".gif": "gif"}  # fmt: skip
STEADY = 0.1  # relative jitter of frame durations at a constant rate (matroska counts in ms)
LACKING = 0.5  # seconds that a file may be shorter than its header promises


class VideoClip:
    """A time span of a video file. Frames are (H, W, 3) uint8 RGB, upright, with square pixels.

    `wanted`: seconds from the start of the span that will be needed; one pass decodes them all.
    `width`: wider frames are scaled down to it.
    """

    def __init__(
        self,
        path: Path,
        info: VideoFile,
        start: float = 0.0,
        end: float | None = None,
        wanted: Iterable[float] = (),
        width: int | None = None,
    ) -> None:
        self.path, self.info, self.start, self.width = path, info, start, width
        self.end = info.seconds if end is None else end
        self._wanted = {*wanted}
        self._shown: dict[float, np.ndarray] = {}

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def load(self) -> None:
        """Decodes the frames at `wanted`."""
        if self._wanted:
            self.at(self._wanted)

    def at(self, times: Iterable[float]) -> list[np.ndarray]:
        """The frames at `times`, in seconds from the start of the span. Raises BadItem."""
        times = list(times)
        missing = sorted({*times, *self._wanted} - self._shown.keys())
        if missing:
            self._shown |= zip(missing, self.iter_at(missing), strict=True)
        return [self._shown[t] for t in times]

    def iter_at(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The frame at each of `times`, which increase; one frame is in memory at a time.

        A time before the first frame of the span gives that frame. Raises BadItem.
        """
        held: Any = None
        image: np.ndarray | None = None
        waiting = [*reversed(times)]
        with self._frames() as frames:
            for at, frame in frames:
                while waiting and held is not None and waiting[-1] + self.start < at - 1e-6:
                    image = _image(held, self.info, self.width) if image is None else image
                    yield image
                    waiting.pop()
                if not waiting:
                    return
                held, image = frame, None
        if held is None:
            raise BadItem(f"has no frame from {self.start:.2f} s to {self.end:.2f} s")
        image = _image(held, self.info, self.width) if image is None else image
        for _ in waiting:
            yield image

    def stream(self, width: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds from the start of the span, frame) for every frame, at most `width` wide.

        Raises BadItem.
        """
        with self._frames() as frames:
            for at, frame in frames:
                yield at - self.start, _image(frame, self.info, width)

    @contextmanager
    def _frames(self) -> Iterator[Iterator[tuple[float, Any]]]:
        with opened(self.path) as (container, stream):
            first = self.info.first
            container.seek(first + int(self.start / stream.time_base), stream=stream)
            yield self._in_span(container.decode(stream), float(stream.time_base))

    def _in_span(self, frames: Iterator[Any], unit: float) -> Iterator[tuple[float, Any]]:
        for frame in frames:
            if frame.is_corrupt:
                raise BadItem("has a corrupt frame")
            if frame.pts is None:
                raise BadItem("has frames without a time")
            at = round((frame.pts - self.info.first) * unit, 6)
            if at >= self.end - 1e-6:
                return
            if at >= self.start - 1e-6:
                yield at, frame


def probe(path: Path) -> VideoFile:
    """The metadata of a file, without decoding its frames. Raises BadItem."""
    if path.stat().st_size == 0:
        raise BadItem("is empty")
    with opened(path) as (container, stream):
        times = sorted(_packet_times(container, stream))
        if not times:
            raise BadItem("has no frame")
        unit = float(stream.time_base)
        # in other containers this number may count something else
        declared = stream.frames if CONTAINERS[path.suffix.lower()] in ("mp4", "mov") else 0
        steps = np.diff(times) * unit
        step = float(np.median(steps)) if len(steps) else 1 / float(stream.guessed_rate or 25)
        seconds = round((times[-1] - times[0]) * unit + step, 6)
        if declared and len(times) < declared:
            raise BadItem(f"is truncated: it has {len(times)} of its {declared} frames")
        length = _length(container, stream)
        if length is not None and seconds + (times[0] * unit) < length - LACKING:
            raise BadItem(f"is truncated: it has {seconds:.1f} of its {length:.1f} s")
        if step <= 0:
            raise BadItem("has frames whose times repeat")
        rotation = next((f.rotation for f in _first(container, stream, times[0])), 0)
        wide = stream.sample_aspect_ratio or 1
        height, width = stream.height, max(1, round(stream.width * wide))
        height, width = (width, height) if rotation % 180 else (height, width)
        codec: Any = stream.codec_context
        return VideoFile(
            sha256=digest_of(path), width=width, height=height, frames=len(times), seconds=seconds,
            fps=round(len(times) / seconds, 6), first=times[0], rotation=rotation,
            variable=bool(len(steps) and np.abs(steps / step - 1).max() > STEADY),
            codec=codec.name, pixels=codec.pix_fmt or "",
        )  # fmt: skip


def _packet_times(container: Any, stream: Any) -> Iterator[int]:
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            at = packet.dts if packet.pts is None else packet.pts
            if at is None:
                raise BadItem("has frames without a time")
            yield at


def _first(container: Any, stream: Any, at: int) -> Iterator[Any]:
    container.seek(at, stream=stream)
    yield from container.decode(stream)
    raise BadItem("has no frame that can be decoded")


def _length(container: Any, stream: Any) -> float | None:
    """Seconds of video according to the header; None where that may be the length of the sound."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return container.duration / 1e6
    return None


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file; turns decoding errors in the block into BadItems."""
    import av
    from av.error import FFmpegError

    try:
        with (
            path.open("rb") as file,
            av.open(file, format=CONTAINERS[path.suffix.lower()]) as container,
        ):
            if not container.streams.video:
                raise BadItem("has no video")
            stream = container.streams.video[0]
            codec: Any = stream.codec_context
            if codec is None:
                raise BadItem("cannot be decoded: unknown codec")
            codec.thread_count = 1  # files are processed in parallel
            codec.options = {"err_detect": "explode"}  # no frames that the decoder makes up
            yield container, stream
    except (FFmpegError, OSError, ValueError) as e:
        raise BadItem(f"cannot be decoded: {getattr(e, 'strerror', None) or e}") from e


def _image(frame: Any, info: VideoFile, width: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 with square pixels, scaled down to `width` where it is wider."""
    turned = info.rotation % 180 != 0
    w, h = (info.height, info.width) if turned else (info.width, info.height)
    if width is not None and info.width > width:
        h, w = max(1, round(h * width / info.width)), max(1, round(w * width / info.width))
    same = (w, h) == (frame.width, frame.height)
    size = {} if same else {"width": w, "height": h, "interpolation": "AREA"}
    image = frame.to_ndarray(format="rgb24", **size)
    return np.ascontiguousarray(np.rot90(image, info.rotation // 90)) if info.rotation else image
