"""Raw video, and the interfaces of the stages of task=prepare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class VideoFile:
    """Properties of a video file.

    `width` and `height` are those of the upright frames with square pixels; `fps` is the mean
    frame rate, `variable` whether it varies; `first` the time of the first frame in the stream's
    time base; `rotation` the counter-clockwise rotation that makes frames upright, in degrees,
    after which they are mirrored left to right where `mirrored`.
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
    mirrored: bool = False


class VideoClip(Protocol):
    """A time span of a video file. Frames are (H, W, 3) uint8 RGB, upright, with square pixels.

    Methods that decode raise BadItem for a broken file.
    """

    info: VideoFile
    start: float  # seconds from the first frame of the file

    @property
    def seconds(self) -> float: ...

    def at(self, times: Iterable[float]) -> list[np.ndarray]:
        """The frames shown at `times`, in seconds from the start of the span."""
        ...

    def iter_at(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The same for increasing times, with one frame in memory at a time."""
        ...

    def stream(self, width: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """(time, frame) of every frame, scaled down to at most `width` pixels."""
        ...


# "id", "source" (name below the folder), "path", "info" (VideoFile), "start", "end" (seconds),
# "scores" {stage: the result of its `score`}, and fields that stages set: "caption", "split", ...
Row = dict[str, Any]
# (start, end) in seconds and the reason why it is dropped; "" where it is kept
Span = tuple[float, float, str]


@dataclass(frozen=True)
class Rendering:
    """A clip to write: frames of one even size, their fps, and the CRF of libx264."""

    frames: Iterator[np.ndarray]
    fps: float
    crf: float


@runtime_checkable
class ScoringStage(Protocol):
    """A stage that scores each clip on its own, in a worker."""

    def score(self, clip: VideoClip) -> dict[str, Any]:
        """Scores by name, in plain containers. Raises BadItem."""
        ...


@runtime_checkable
class CuttingStage(ScoringStage, Protocol):
    """A stage that cuts a clip into several."""

    def spans(self, scores: dict[str, Any], seconds: float) -> list[Span]:
        """Spans in order, without overlap, including those that are dropped."""
        ...


@runtime_checkable
class DecidingStage(Protocol):
    """A stage that drops or labels clips, from the scores of all clips that are still kept."""

    def decide(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """For each row: {} for no change, {"drop": reason}, or fields to set."""
        ...


@runtime_checkable
class RenderingStage(Protocol):
    """The stage that produces the clip to write, in a worker."""

    def render(self, clip: VideoClip) -> Rendering: ...
