"""Configs of clips: where they come from, how they are prepared, how they are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from sandbox.contracts.checks import in_range
from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.sizes import Clip

# Settings of data that say how clips come: they change neither clips nor who is held out.
LOADING = frozenset(
    {"batch_size", "bucket_batch_sizes", "drop_incomplete", "num_workers", "max_bad", "num_prompts"}
)


@dataclass
class DataConfig(PluginConfig):
    """The source of clips. Every data plugin has these fields, under these names.

    root: folder of the data (null where the plugin makes or ships them); frames, height, width:
    size of a clip in frames and pixels; batch_size: clips per process and micro-batch;
    drop_incomplete: without the smaller last micro-batch of an epoch (of each size); num_workers:
    loader processes, 0 loads in the training process; max_bad: items that may be unusable before
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
        """Every size a batch may have: one, or all buckets, images included.

        The first is that of samples.
        """
        return (Clip(3, self.frames, self.height, self.width),)

    def batch_of(self, clip: Clip) -> int:
        """Clips of this size per process and micro-batch."""
        return self.batch_size

    def alternates_sizes(self) -> bool:
        """Whether micro-batches of each size come in turn, so that with as many of them a step has
        one of each; else in no order.
        """
        return False

    def stored(self) -> str | None:
        """Folder that task=encode has filled, where batches bring stored latents and no pixels."""
        return None

    def all_clips(self) -> Self:
        """These data where training sees all of their clips: what a fitted first stage and a metric
        learn from, so that they are the same whatever part of the clips a system trains on.
        """
        return self

    def provides(self) -> frozenset[str]:
        """Batch fields: "video", "captions", "fps", ...; and "prompts" where `prompts()` is not
        empty.
        """
        return frozenset({"video"})

    def metric(self) -> str | None:
        """Name of the metric plugin that scores this kind of data; None where there is none."""
        return None


@dataclass
class MetricConfig(PluginConfig):
    """A score of generated clips."""

    def needs(self) -> frozenset[str]:
        """Fields that the data must provide: "captions", "digit_captions", ..."""
        return frozenset()

    def accepts(self, clip: Clip) -> Iterator[str]:
        """Problems with clips of this size, one line each."""
        yield from ()

    def learns_from(self) -> int:
        """Real training clips that it is fitted with; 0: none."""
        return 2048


@dataclass
class StageConfig(PluginConfig):
    """One step of task=prepare, from a folder of raw videos to clips that can be trained on.

    `limits`: settings that decide no score. Changing one of them computes none again.
    `distributions`: packages whose versions the manifest names.
    """

    limits: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()

    def times(self, seconds: float) -> list[float]:
        """Seconds from the start of a clip of that length of the frames that `score` reads."""
        return []
