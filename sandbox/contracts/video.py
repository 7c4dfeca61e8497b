"""Raw video, and what the stages of task=prepare promise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class VideoFile:
    """What is in a video file. `fps` is its mean rate, `first` the time of the first frame in the
    unit of the stream, `variable` whether its rate changes, `rotation` degrees counter-clockwise
    that its frames are to be turned by; `width` and `height` are those of the upright picture.
    """

    sha256: str
    width: int
    height: int
    frames: int
    seconds: float
    fps: float
    first: int = 0
    rotation: int = 0
    variable: bool = False
    codec: str = ""
    pixels: str = ""


class VideoClip(Protocol):
    """A span of a video file. Frames are (H, W, 3) uint8 RGB, upright, with square pixels.

    All that decodes raises BadItem for a file that is broken.
    """

    info: VideoFile
    start: float  # seconds from the first frame of the file

    @property
    def seconds(self) -> float: ...

    def at(self, times: Iterable[float]) -> list[np.ndarray]:
        """The frames shown at `times`, seconds from the start of the span."""
        ...

    def iter_at(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The same for times that increase, with one frame in memory at a time."""
        ...

    def stream(self, width: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """(time, frame) of every frame, at most `width` pixels wide."""
        ...


# "id", "source" (name below the folder), "path", "info" (VideoFile), "start", "end" (seconds),
# "scores" {stage: what its look found}, and what stages said of the clip: "caption", "split", ...
Row = dict[str, Any]
# (start, end) in seconds, and why it is dropped; "" where it is not
Span = tuple[float, float, str]


@dataclass(frozen=True)
class Rendering:
    """A clip as it is written: frames of one even size, their rate, and libx264's quality."""

    frames: Iterator[np.ndarray]
    fps: float
    crf: float


@runtime_checkable
class ScoringStage(Protocol):
    """A stage that scores clips; in a worker, of one clip alone."""

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """Scores by name, in plain containers. Raises BadItem."""
        ...


@runtime_checkable
class CuttingStage(ScoringStage, Protocol):
    """A stage that makes several clips of one."""

    def spans(self, scores: dict[str, Any], seconds: float) -> list[Span]:
        """In order, without overlap, those that are dropped included."""
        ...


@runtime_checkable
class DecidingStage(Protocol):
    """A stage that decides, from the scores of all clips that are still kept."""

    def decide(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What it says of each row: {} nothing, {"drop": why}, or fields of the row to set."""
        ...


@runtime_checkable
class RenderingStage(Protocol):
    """The stage that makes the clip that is written; in a worker."""

    def render(self, clip: VideoClip) -> Rendering: ...
