"""All randomness of a step, by name and by sample.

A number depends on (seed, name, epoch, position of the sample in the epoch) and on nothing else: not on the process,
the micro-batch, the device count, or on which other numbers were drawn. So two processes equal one with the same
global batch, a resumed run equals the uninterrupted one, and a new draw shifts no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def keyed(*key: object) -> np.random.Generator:
    """A generator that depends on `key` alone (about 10 us)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def numbers(positions: np.ndarray, *key: object) -> np.ndarray:
    """(B,) uint64, one for each position, all bits random: SplitMix64 (Steele et al. 2014) from a hash of `key`."""
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        x = np.uint64(start) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Keyed:
    """Draws for the samples at `positions` of an epoch.

    `group` is the number of clips in one optimizer step over all processes: `stratified` spreads over it.
    """

    def __init__(self, seed: int, epoch: int, positions: Tensor, group: int) -> None:
        self.seed, self.epoch, self.group = seed, epoch, group
        self.positions = positions.cpu().numpy()
        self.device = positions.device

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal of the shape, dtype and device of `like`; each sample has a generator of its own.

        torch's CPU generator takes 32 bits of a seed: two of a million samples may share their noise, far apart.
        """
        if like.shape[0] != len(self.positions):
            raise ValueError(f"{name}: like has batch {like.shape[0]}, the draws are for {len(self.positions)}")
        out, generator = torch.empty(like.shape), torch.Generator()
        for row, seed in zip(out, self._numbers(name).tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(seed >> 1))
        return out.to(like)

    def uniform(self, name: str) -> Tensor:
        high_bits = (self._numbers(name) >> np.uint64(40)).astype(np.float32)
        return torch.from_numpy(high_bits * np.float32(2**-24)).to(self.device)

    def stratified(self, name: str) -> Tensor:
        """One value in each of `group` equal parts for the samples of one optimizer step, parts in random order."""
        steps, places = self.positions // self.group, self.positions % self.group
        parts = np.empty(len(steps), dtype=np.float32)
        for step in np.unique(steps):
            order = numbers(np.arange(self.group), self.seed, name, self.epoch, "order", int(step)).argsort()
            parts[steps == step] = order[places[steps == step]]
        low = torch.from_numpy(parts).to(self.device)
        return ((low + self.uniform(name)) / self.group).clamp_max(1 - 2**-24)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        found = (self._numbers(name) >> np.uint64(11)) % np.uint64(high - low)
        return torch.from_numpy(low + found.astype(np.int64)).to(self.device)

    def shared(self) -> Shared:
        return Shared(self)

    def _numbers(self, name: str) -> np.ndarray:
        return numbers(self.positions, self.seed, name, self.epoch)


class Shared:
    """The same names with one value for the whole micro-batch: that of its first sample."""

    def __init__(self, draws: Keyed) -> None:
        self.size = len(draws.positions)
        self.first = Keyed(draws.seed, draws.epoch, torch.from_numpy(draws.positions[:1]), draws.group)
        self.device = draws.device

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self.first.normal(name, like[:1]).expand_as(like)

    def uniform(self, name: str) -> Tensor:
        return self.first.uniform(name).to(self.device).expand(self.size)

    def stratified(self, name: str) -> Tensor:
        return self.first.stratified(name).to(self.device).expand(self.size)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self.first.integers(name, low, high).to(self.device).expand(self.size)

    def shared(self) -> Shared:
        return self


class Recorded:
    """Replays a recorded step: `values` by name. A name that was not recorded raises KeyError with the names there are."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values

    def _get(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"draw {name!r} was not recorded; there are {sorted(self.values)}")
        return self.values[name]

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self._get(name).to(like).expand_as(like)

    def uniform(self, name: str) -> Tensor:
        return self._get(name)

    def stratified(self, name: str) -> Tensor:
        return self._get(name)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self._get(name)

    def shared(self) -> Recorded:
        return self
