"""Data interfaces: the clips of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sandbox.contracts.sizes import Clip

if TYPE_CHECKING:
    import numpy as np


# "video" (3, T, H, W) float32 in [-1, 1] or "stored" (P, T, H, W); other keys of SAMPLE_TENSORS;
# "caption" str; names in NUMBERS: float
Sample = dict[str, Any]


class Items(Protocol):
    """One split of a data set; indices are in [0, len)."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """`rng`, keyed by (seed, epoch, id), is the only source of randomness. Raises BadItem."""
        ...


@runtime_checkable
class Bucketed(Protocol):
    """Items of several sizes; all clips of a micro-batch have one size."""

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        """Size of the clip that `load` returns with the same `rng`, whose first draws these are.

        Decodes and raises nothing; the size of an unreadable item is arbitrary.
        """
        ...


@runtime_checkable
class Hashed(Protocol):
    """Items that can hash the source data of a clip without loading it (for task=encode)."""

    def content(self, index: int) -> str:
        """A hash of everything that is read for the clip; raises BadItem."""
        ...


class DataSource(Protocol):
    """A `data` plugin."""

    def split(self, name: str) -> Items:
        """The split "train" or "val"; raises DataError.

        "val" shares no source with "train", and its items do not use `rng`.
        """
        ...

    def prompts(self) -> list[str]:
        """Captions for samples and scores, in a fixed order; may be empty."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """A `data` plugin whose clips have classes, `DataConfig.labels` of them."""

    def label(self, caption: str) -> int | None:
        """The number of the class that a prompt names; None if it names none."""
        ...
