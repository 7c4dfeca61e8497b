"""Keys and values of earlier frames, for networks whose frames attend to earlier ones only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class FrameCache:
    """Keys and values (B, W, S, H, d) of the last frames, by pass and layer, W in its window.

    They keep what they saw when they were computed: with several layers a frame depends on frames
    that have left the window, as it does in a pass over all frames with the same banded mask.
    `frames`: the number of frames so far, also those that have left.
    """

    frames: int = 0
    is_writing: bool = False
    layers: dict[tuple[Hashable, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @contextmanager
    def writing(self, frames: int) -> Iterator[FrameCache]:
        """Calls inside the block add their `frames` frames to the cache."""
        self.is_writing = True
        yield self
        self.is_writing = False
        self.frames += frames

    def of(self, passes: Sequence[Hashable]) -> PassCache:
        """The cache of passes that run as one batch, in this order."""
        return PassCache(self, passes)

    def elements(self) -> int:
        """Number of elements that it holds."""
        return sum(x.numel() for pair in self.layers.values() for x in pair)


@dataclass
class PassCache:
    """A FrameCache for a batch of passes. `attention` layers have numbers from 0."""

    cache: FrameCache
    passes: Sequence[Hashable]

    @property
    def frames(self) -> int:
        return self.cache.frames

    def extended(
        self, layer: int, keys: Tensor, values: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, S, H, d) after those of the cached frames, at most `window`."""
        layers, count = self.cache.layers, len(self.passes)
        known = [layers[p, layer] for p in self.passes if (p, layer) in layers]
        if known:
            old_keys, old_values = (torch.cat(x) for x in zip(*known, strict=True))
            keys, values = torch.cat((old_keys, keys), 1), torch.cat((old_values, values), 1)
        if self.cache.is_writing:
            last = [x[:, max(0, x.shape[1] - window) :].chunk(count) for x in (keys, values)]
            for p, key, value in zip(self.passes, *last, strict=True):
                layers[p, layer] = key.clone(), value.clone()
        return keys, values
