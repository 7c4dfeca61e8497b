"""Video files (PyAV): what is shown of them, for task=prepare and the data plugins alike.

What is shown: the frames of the best video track, without cover images and without those that an
edit list hides, upright, with square pixels. The content decides which container a file is; others
than those of CONTAINERS are never opened. Times are presentation times. An unusable file raises
BadItem.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sandbox.contracts import BadItem, VideoFile
from sandbox.data.file_kinds import kind_of
from sandbox.data.image_files import Media
from sandbox.storage.atomic import digest_of

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Formats are not probed: a playlist named .mp4 must not open other files or URLs.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska",
              ".avi": "avi", ".gif": "gif"}  # fmt: skip
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # an mp4 or mov starts so
STEADY = 0.1  # relative jitter of frame durations at a constant rate (matroska counts in ms)
LACKING = 0.5  # seconds that a file may be shorter than its header promises
NEAR = 0.01  # relative difference of the listed frame rate from that of the frames, if variable
WIDEST = 16  # of a pixel's sides, the larger over the smaller

Size = tuple[int, int, int]  # frames, height, width
Orientation = tuple[int, bool]  # degrees counter-clockwise, then whether it is mirrored


class VideoClip:
    """A time span of a video file. Frames are (H, W, 3) uint8 RGB, upright, with square pixels.

    Times are seconds from the first frame, rounded to microseconds, so that variable frame rates
    work. `wanted`: seconds from the start of the span that will be needed; one pass decodes them
    all. `width`: wider frames are scaled down to it.
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
                    image = self._image(held, self.width) if image is None else image
                    yield image
                    waiting.pop()
                if not waiting:
                    return
                held, image = frame, None
        if held is None:
            raise BadItem(f"has no frame from {self.start:.2f} s to {self.end:.2f} s")
        image = self._image(held, self.width) if image is None else image
        for _ in waiting:
            yield image

    def stream(self, width: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """(seconds from the start of the span, frame) for every frame, at most `width` wide.

        Raises BadItem.
        """
        with self._frames() as frames:
            for at, frame in frames:
                yield at - self.start, self._image(frame, width)

    @contextmanager
    def _frames(self) -> Iterator[Iterator[tuple[float, Any]]]:
        with opened(self.path, strict=True) as video:
            start = self.info.first + int(self.start / video.unit)
            yield self._in_span(video.frames(start, self.info.first), float(video.unit))

    def _in_span(self, frames: Iterator[Any], unit: float) -> Iterator[tuple[float, Any]]:
        for time, frame in frames:
            at = round((time - self.info.first) * unit, 6)
            if at >= self.end - 1e-6:
                return
            if at >= self.start - 1e-6:
                yield at, frame

    def _image(self, frame: Any, width: int | None = None) -> np.ndarray:
        info = self.info
        height, full = info.height, info.width
        if width is not None and full > width:
            height, full = max(1, round(height * width / full)), width
        return _image(frame, (height, full), (info.rotation, info.mirrored))


def probe(path: Path) -> VideoFile:
    """The metadata of a file; decodes its first frame. Raises BadItem."""
    if path.stat().st_size == 0:
        raise BadItem("is empty")
    with opened(path, strict=True) as video:
        video.check_complete()
        if not video.seconds:
            raise BadItem("has frames whose times repeat")
        height, width = video.size
        codec: Any = video.stream.codec_context
        rotation, mirrored = video.orientation
        return VideoFile(
            sha256=digest_of(path), width=width, height=height, frames=len(video.times),
            seconds=video.seconds, fps=round(video.fps, 6),
            first=video.times[0], rotation=rotation, variable=video.is_variable,
            codec=codec.name, pixels=codec.pix_fmt or "", mirrored=mirrored,
        )  # fmt: skip


def video_size(path: Media) -> Size:
    """Number of shown frames, height and width; decodes the first frame. Raises BadItem."""
    with opened(path) as video:
        return video.count(), *video.size


class OpenVideo:
    """The shown frames of an open file. Its methods raise BadItem and PyAV's errors.

    `strict`: refuses frames that the decoder makes up for damaged ones.
    """

    def __init__(self, container: "InputContainer", file: IO[bytes], strict: bool = False) -> None:
        self.container, self.file, self.stream = container, file, _best_track(container)
        self.unit: Fraction = self.stream.time_base or Fraction(1)
        codec: Any = self.stream.codec_context
        codec.thread_count = 1  # files are processed in parallel
        if strict:
            codec.options = {"err_detect": "explode"}
        names = container.format.name.split(",")
        self.is_mov, self.is_avi = bool({"mov", "mp4"} & {*names}), "avi" in names

    @cached_property
    def _packets(self) -> list[tuple[int, int, int, bool]]:
        """Presentation time, decoding time, duration, and whether it is shown, in file order."""
        found = []
        if "_first" in vars(self):
            self._rewind()
        is_vp8 = self.stream.codec_context.name in ("vp8", "libvpx")
        for packet in self.container.demux(self.stream):
            if not packet.size or packet.is_corrupt:  # the last one of a file that is cut off
                continue
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:
                raise BadItem("has frames without a time")
            is_shown = not packet.is_discard
            if is_vp8:  # RFC 6386, section 9.1: show_frame
                is_shown = is_shown and bool(memoryview(packet)[0] & 0x10)
            found.append((time, packet.dts, packet.duration or 0, is_shown))
        return found

    @cached_property
    def times(self) -> list[int]:
        """Presentation times of all shown frames, ascending, in `unit`."""
        packets = [p for p in self._packets if p[3]]
        times = sorted(p[0] for p in packets)
        if times and times[0] < packets[0][0] and not self._is_out_of_order:
            # Frames before the first key frame may need another one that is not in the file.
            self.container.seek(times[0], stream=self.stream)
            first = next(_checked(self.container.decode(self.stream)), None)
            times = [t for t in times if first is not None and first.pts is not None
                     and t >= first.pts]  # fmt: skip
        if not times:
            raise BadItem("has no frame")
        return times

    @cached_property
    def _is_out_of_order(self) -> bool:
        """Whether decoded frames have no right times: AVI with frames that are reordered."""
        return self.is_avi and any(dts is None or pts != dts for pts, dts, _, _ in self._packets)

    @cached_property
    def _steps(self) -> np.ndarray:
        """Seconds between frames."""
        return np.diff(self.times) * float(self.unit)

    @cached_property
    def _step(self) -> float:
        """Seconds between frames, as a rule."""
        if len(self._steps):
            return float(np.median(self._steps))
        return 1 / float(self.stream.guessed_rate or 25)

    @cached_property
    def seconds(self) -> float:
        """From the start of the first frame to the end of the last; 0 if their times repeat."""
        if self._step <= 0:
            return 0.0
        last = max((p for p in self._packets if p[3]), key=lambda p: p[0])[2] * float(self.unit)
        # Matroska rounds durations to milliseconds.
        last = last if last and abs(last / self._step - 1) > STEADY else self._step
        return round((self.times[-1] - self.times[0]) * float(self.unit) + last, 6)

    @property
    def is_variable(self) -> bool:
        return bool(len(self._steps) and np.abs(self._steps / self._step - 1).max() > STEADY)

    @property
    def fps(self) -> float:
        """The file's frame rate, where the frames have it; else frames per second of video."""
        listed = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        if not self.seconds:
            return listed
        measured = len(self.times) / self.seconds
        near = NEAR if self.is_variable else STEADY  # few frames at rounded times
        return listed if abs(listed / measured - 1) <= near else measured

    def count(self) -> int:
        """Shown frames; of mp4 and mov without reading the frames."""
        entries = self.stream.index_entries if self.is_mov else ()
        if not entries or self._is_fragmented():
            return len(self.times)
        start, end = self.stream.start_time or 0, self._file_size()
        if _time(self._first) > start:  # as in `times`
            return len(self.times)
        return sum(e.size > 0 and not e.is_discard and e.pos + e.size <= end for e in entries)

    def check_complete(self) -> None:
        """Raises BadItem for a file that is cut off."""
        times, step = self.times, float(self.unit)
        if self.is_mov:
            lacking = sum(e.size > 0 for e in self.stream.index_entries) - len(self._packets)
            if lacking > 0:
                total = len(times) + lacking
                raise BadItem(f"is truncated: it has {len(times)} of its {total} frames")
        length = self._length()
        if length is not None and self.seconds + times[0] * step < length - LACKING:
            raise BadItem(f"is truncated: it has {self.seconds:.1f} of its {length:.1f} s")

    def _length(self) -> float | None:
        """Seconds of video according to the header; None where that may be something else."""
        if self.is_mov and not self._is_fragmented():
            return None  # the index is complete
        if self.stream.duration:
            return float(self.stream.duration * self.unit)
        if self.container.duration and len(self.container.streams) == 1:
            return self.container.duration / 1e6
        return None

    def _file_size(self) -> int:
        at = self.file.tell()
        end = self.file.seek(0, 2)
        self.file.seek(at)  # where libav reads next
        return end

    def _is_fragmented(self) -> bool:
        """Whether an mp4 or mov has fragments with their own indices."""
        at = self.file.tell()
        try:
            place, end = 0, self._file_size()
            while place + 8 <= end:
                self.file.seek(place)
                head = self.file.read(16)
                length = int.from_bytes(head[:4])
                length = int.from_bytes(head[8:]) if length == 1 else length
                if head[4:8] == b"moof":
                    return True
                if length < 8:  # 0: to the end of the file
                    return False
                place += length
            return False
        finally:
            self.file.seek(at)

    def _rewind(self) -> None:
        self.container.seek(self.stream.start_time or 0, stream=self.stream)

    @cached_property
    def _first(self) -> "VideoFrame":
        """The first shown frame."""
        self._rewind()
        first = next(_checked(self.container.decode(self.stream)), None)
        if first is None:
            raise BadItem("has no frame that can be decoded")
        return first

    @cached_property
    def orientation(self) -> Orientation:
        return _orientation(self._first)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self._size_of(self._first)

    def _size_of(self, frame: "VideoFrame") -> tuple[int, int]:
        aspect = self.stream.sample_aspect_ratio or Fraction(1)
        if not 1 / WIDEST <= aspect <= WIDEST:
            raise BadItem(f"has pixels of {aspect.numerator}:{aspect.denominator}; write it again")
        height, width = frame.height, max(1, round(frame.width * aspect))
        return (width, height) if _orientation(frame)[0] % 180 else (height, width)

    def image(self, frame: "VideoFrame") -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright, with square pixels."""
        return _image(frame, self._size_of(frame), _orientation(frame))

    def frames(self, start: int, first: int) -> Iterator[tuple[int, "VideoFrame"]]:
        """(time, frame) in display order, from a key frame before `start`; `first`: `times[0]`."""
        if self.is_avi and self._is_out_of_order:
            self.container.seek(0, stream=self.stream)
            yield from zip(self.times, _checked(self.container.decode(self.stream)), strict=False)
            return
        self.container.seek(start, stream=self.stream)
        frames = _checked(self.container.decode(self.stream))
        head = next(frames, None)
        if start > first and (head is None or _time(head) > start):
            # Frames that are decoded after a key frame may be shown before it.
            self.container.seek(first, stream=self.stream)
            frames, head = _checked(self.container.decode(self.stream)), None
        for frame in chain(() if head is None else (head,), frames):
            yield _time(frame), frame


def _time(frame: "VideoFrame") -> int:
    if frame.pts is None:
        raise BadItem("has frames without a time")
    return frame.pts


def _checked(frames: Iterable["VideoFrame"]) -> Iterator["VideoFrame"]:
    for frame in frames:
        if frame.is_corrupt:
            raise BadItem("has a corrupt frame")
        yield frame


@contextmanager
def opened(path: Media, strict: bool = False) -> Iterator[OpenVideo]:
    """The video of a file; turns errors of reading and decoding in the block into BadItems."""
    import av
    from av.error import FFmpegError

    start = None
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            kind = _container(start, path.suffix.lower())
            # "replace": the text of a title does not matter.
            with av.open(file, mode="r", format=kind, metadata_errors="replace") as container:
                yield OpenVideo(container, file, strict)
    except (FFmpegError, OSError, ValueError) as e:
        other = None if start is None else kind_of(start)
        reason = other or getattr(e, "strerror", None) or e
        raise BadItem(f"cannot be decoded: {reason}") from e


def _container(start: bytes, suffix: str) -> str:
    """PyAV's name of the container, from a file's first bytes, else its suffix."""
    if start.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if start[4:8] in BOXES:
        return "mp4"
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return "avi"
    return "gif" if start.startswith(b"GIF8") else CONTAINERS[suffix]


def _best_track(container: "InputContainer") -> "VideoStream":
    """The track that players show. Raises BadItem."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    tracks = [s for s in container.streams.video if not s.disposition & still]
    if not tracks:
        only = "; it has only a cover image" if container.streams.video else ""
        raise BadItem(f"has no video{only}")
    usable = [s for s in tracks if s.codec_context is not None]
    if not usable:
        raise BadItem("cannot be decoded: its codec is not known")
    best: Any = container.streams.best("video")
    if best is not None and best.index in [s.index for s in usable]:
        return best
    is_default = Disposition.default
    return max(usable, key=lambda s: (bool(s.disposition & is_default), s.width * s.height))


def _orientation(frame: "VideoFrame") -> Orientation:
    """The turn and mirroring that make a frame upright, from its display matrix."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(data, "<i4")[:5].tolist()
    # (x, y) -> (a x + c y, b x + d y); y points down
    corners = np.arange(4).reshape(2, 2)
    shown = corners.T if abs(b) > abs(a) else corners
    rows, columns = (b, c) if abs(b) > abs(a) else (d, a)
    shown = shown[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1]
    options = [(degrees, mirrored) for degrees in (0, 90, 180, 270) for mirrored in (False, True)]
    return next(o for o in options if np.array_equal(_turned(corners, o), shown))


def _turned(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    degrees, mirrored = orientation
    image = np.rot90(image, degrees // 90)
    return image[:, ::-1] if mirrored else image


def _image(frame: Any, size: tuple[int, int], orientation: Orientation) -> np.ndarray:
    """(height, width, 3) uint8 of `size`."""
    height, width = size[::-1] if orientation[0] % 180 else size
    same = (width, height) == (frame.width, frame.height)
    scaled = {} if same else {"width": width, "height": height, "interpolation": "AREA"}
    # One thread: a forked data worker would wait for threads that it does not have.
    image = frame.to_ndarray(format="rgb24", threads=1, **scaled)
    return np.ascontiguousarray(_turned(image, orientation))
