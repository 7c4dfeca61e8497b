"""Keyed random draws: all randomness of a step, by name and by sample.

A number depends only on (seed, name, epoch, position of the sample in the epoch): not on the
process, the micro-batch, the number of devices or other draws. So two processes equal one with the
same global batch, a resumed run equals the uninterrupted one, and a new draw changes no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


class _Digest(np.random.bit_generator.ISeedSequence):
    """Seeds a bit generator from a hash; numpy's own class also reads entropy from the system."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.frombuffer(self.digest, dtype)[:n_words]


def keyed(*key: object) -> np.random.Generator:
    """A numpy generator seeded by `key` alone (about 4 us)."""
    digest: Any = _Digest(_hash(key, 16))  # numpy accepts it, but its type hints do not
    return np.random.Generator(np.random.Philox(digest))


def seed_of(*key: object) -> int:
    """63 random bits, a function of `key` alone."""
    return int.from_bytes(_hash(key, 8), "little") >> 1


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seeds torch's global generators, which only module dropout uses.

    torch.manual_seed would cost 130 us.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _hash(key: tuple[object, ...], size: int) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=size).digest()


def numbers(positions: np.ndarray, *key: object) -> np.ndarray:
    """(B,) uint64 of 64 random bits, one per position.

    SplitMix64 (Steele et al. 2014), started from a hash of `key`.
    """
    start = int.from_bytes(_hash(key, 8), "little")
    with np.errstate(over="ignore"):
        x = positions.astype(np.uint64) + np.uint64(1)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Keyed:
    """Draws for the samples at `positions` of an epoch, on `device` (default: theirs).

    `group`: clips in one optimizer step over all processes, over which `stratified` draws spread.
    Numbers are made on the CPU, so that all devices get the same. Positions on the CPU avoid a
    device sync.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        positions: Tensor,
        group: int,
        device: torch.device | None = None,
    ) -> None:
        self.seed, self.epoch, self.group = seed, epoch, group
        self.positions = positions.cpu().numpy()
        self.device = device or positions.device

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal with the shape, dtype and device of `like`; one generator per sample.

        torch's CPU generator uses 32 bits of a seed: of a million samples a few pairs share noise.
        """
        if like.shape[0] != len(self.positions):
            raise ValueError(
                f"{name}: like has batch {like.shape[0]}, the draws are for {len(self.positions)}"
            )
        out, generator = torch.empty(like.shape), torch.Generator()
        for row, seed in zip(out, self._numbers(name).tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(seed >> 1))
        return out.to(like)

    def uniform(self, name: str) -> Tensor:
        high_bits = (self._numbers(name) >> np.uint64(40)).astype(np.float32)
        return torch.from_numpy(high_bits * np.float32(2**-24)).to(self.device)

    def stratified(self, name: str) -> Tensor:
        """For each `group` consecutive positions, one value in each of `group` equal intervals.

        Those positions are the clips of an optimizer step, if the epoch is a multiple of it. The
        intervals are in random order, so that each value by itself is uniform.
        """
        steps, places = self.positions // self.group, self.positions % self.group
        parts = np.empty(len(steps), dtype=np.float32)
        for step in np.unique(steps):
            key = (self.seed, name, self.epoch, "order", int(step))
            order = numbers(np.arange(self.group), *key).argsort()
            parts[steps == step] = order[places[steps == step]]
        low = torch.from_numpy(parts).to(self.device)
        return ((low + self.uniform(name)) / self.group).clamp_max(1 - 2**-24)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        found = (self._numbers(name) >> np.uint64(11)) % np.uint64(high - low)
        return torch.from_numpy(low + found.astype(np.int64)).to(self.device)

    def shared(self, over: str = "micro_batch") -> Shared:
        return Shared(self, over)

    def _numbers(self, name: str) -> np.ndarray:
        return numbers(self.positions, self.seed, name, self.epoch)


class Shared:
    """The same draws with one value for the micro-batch or the optimizer step.

    It is that of the first sample. Steps are counted as in `Keyed.stratified`.
    """

    def __init__(self, draws: Keyed, over: str) -> None:
        self.size, self.first = len(draws.positions), copy(draws)
        first = draws.positions[:1]
        self.first.positions = first - first % draws.group if over == "step" else first

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self.first.normal(name, like[:1]).expand_as(like)

    def uniform(self, name: str) -> Tensor:
        return self.first.uniform(name).expand(self.size)

    def stratified(self, name: str) -> Tensor:
        return self.first.stratified(name).expand(self.size)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self.first.integers(name, low, high).expand(self.size)

    def shared(self, over: str = "micro_batch") -> Self:
        return self


class Recorded:
    """Draws of a recorded step: `values` by name; KeyError for other names."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values

    def normal(self, name: str, like: Tensor) -> Tensor:
        return self.uniform(name).to(like).expand_as(like)

    def uniform(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"draw {name!r} was not recorded; there are {sorted(self.values)}")
        return self.values[name]

    stratified = uniform

    def integers(self, name: str, low: int, high: int) -> Tensor:
        return self.uniform(name)

    def shared(self, over: str = "micro_batch") -> Self:
        return self
