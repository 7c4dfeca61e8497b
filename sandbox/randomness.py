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


class Keyed:
    """Draws for the samples at `positions` of an epoch.

    `group` is the number of clips in one optimizer step over all processes: `stratified` spreads over it.
    """

    def __init__(self, seed: int, epoch: int, positions: Tensor, group: int) -> None:
        self.seed, self.epoch, self.group = seed, epoch, group
        self.positions = [int(p) for p in positions]
        self.device = positions.device

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal of the shape, dtype and device of `like`; each sample has its own generator."""
        if like.shape[0] != len(self.positions):
            raise ValueError(f"{name}: like has batch {like.shape[0]}, the draws are for {len(self.positions)}")
        out = np.empty(like.shape, dtype=np.float32)
        for row, p in zip(out, self.positions, strict=True):
            keyed(self.seed, name, self.epoch, p).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(out).to(like)

    def uniform(self, name: str) -> Tensor:
        values = [keyed(self.seed, name, self.epoch, p).random(dtype=np.float32) for p in self.positions]
        return torch.tensor(np.array(values, dtype=np.float32), device=self.device)

    def stratified(self, name: str) -> Tensor:
        """One value in each of `group` equal parts for the samples of one optimizer step, parts in random order."""
        orders: dict[int, np.ndarray] = {}
        parts = []
        for p in self.positions:
            step, place = divmod(p, self.group)
            if step not in orders:
                orders[step] = keyed(self.seed, name, self.epoch, "order", step).permutation(self.group)
            parts.append(orders[step][place])
        low = torch.tensor(np.array(parts, dtype=np.float32), device=self.device)
        return ((low + self.uniform(name)) / self.group).clamp_max(1 - 2**-24)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        values = [int(keyed(self.seed, name, self.epoch, p).integers(low, high)) for p in self.positions]
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def shared(self) -> Shared:
        return Shared(self)


class Shared:
    """The same names with one value for the whole micro-batch: that of its first sample."""

    def __init__(self, draws: Keyed) -> None:
        self.size = len(draws.positions)
        self.first = Keyed(draws.seed, draws.epoch, torch.tensor(draws.positions[:1]), draws.group)
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
