"""Configs of data, metrics and the stages of task=prepare."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from sandbox.contracts.checks import in_range
from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.sizes import Clip

# Settings of data that affect loading only, neither the clips nor the validation split.
LOADING = frozenset(
    {"batch_size", "bucket_batch_sizes", "drop_incomplete", "num_workers", "max_bad", "num_prompts"}
)


@dataclass
class DataConfig(PluginConfig):
    """The source of clips. Every data plugin has these fields, under these names.

    root: folder of the data (null if the plugin generates or ships them); frames, height, width:
    size of a clip in frames and pixels; batch_size: clips per process and micro-batch;
    drop_incomplete: drop the smaller last micro-batch of an epoch (of each size); num_workers:
    loader processes (0 loads in the training process); max_bad: unusable items allowed before
    the run ends with exit code 3.
    """

    root: str | None = None
    frames: int = 9
    height: int = 16
    width: int = 16
    batch_size: int = 32
    drop_incomplete: bool = False
    num_workers: int = 0
    max_bad: int = 100

    def problems(self) -> Iterator[str]:
        for name in ("frames", "height", "width", "batch_size"):
            yield from in_range(name, getattr(self, name), 1)
        for name in ("num_workers", "max_bad"):
            yield from in_range(name, getattr(self, name), 0)

    def clips(self) -> tuple[Clip, ...]:
        """All sizes of a batch: one, or all buckets including images. Samples use the first."""
        return (Clip(3, self.frames, self.height, self.width),)

    def batch_of(self, clip: Clip) -> int:
        """Clips of this size per process and micro-batch."""
        return self.batch_size

    def alternates_sizes(self) -> bool:
        """Whether micro-batches cycle through the sizes; otherwise sizes come in random order.

        With `accumulate` equal to the number of sizes, each step then has one micro-batch of each.
        """
        return False

    def stored(self) -> str | None:
        """Folder of latents from task=encode, if batches have cached latents instead of pixels."""
        return None

    def all_clips(self) -> Self:
        """The same data without a restriction to a subset of the clips.

        First stages and metrics are fitted to these, so that they do not depend on the subset that
        a system trains on.
        """
        return self

    def provides(self) -> frozenset[str]:
        """Batch fields: "video", "captions", "fps", ...; "prompts" if `prompts()` is not empty."""
        return frozenset({"video"})

    def labels(self) -> int:
        """Number of classes: batches that provide "label" have numbers below it. 0: no classes."""
        return 0

    def metric(self) -> str | None:
        """Name of the metric plugin for this kind of data, or None."""
        return None


@dataclass
class MetricConfig(PluginConfig):
    """A metric of generated clips."""

    def needs(self) -> frozenset[str]:
        """Fields that the data must provide: "captions", "digit_captions", ..."""
        return frozenset()

    def accepts(self, clip: Clip) -> Iterator[str]:
        """Problems with clips of this size, one line each."""
        yield from ()

    def fit_clips(self) -> int:
        """Number of real training clips for `fit`; 0: none."""
        return 2048


@dataclass
class StageConfig(PluginConfig):
    """A stage of task=prepare, which turns a folder of raw videos into training clips.

    `limits`: settings that affect no score, such as thresholds; changing them recomputes nothing.
    `distributions`: packages whose versions are recorded in the manifest.
    """

    limits: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()

    def times(self, seconds: float) -> list[float]:
        """Times of the frames that `score` reads, in seconds, for a clip of this length."""
        return []
