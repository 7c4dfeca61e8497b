"""The tensor side: the few calls that the training step and the samplers make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sandbox.contracts.sizes import Clip

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


# What a sample may bring for the fields of a Batch of these names, without the axis B.
SAMPLE_TENSORS = ("video", "stored", "image", "text", "text_mask", "no_text", "no_text_mask")


@dataclass
class Batch:
    """One micro-batch. B clips of one size. Not frozen: Lightning moves it between devices by
    assignment.
    """

    video: Tensor | None = None  # (B, 3, T, H, W) in [-1, 1]
    stored: Tensor | None = None  # (B, P, T, H, W) a cached Posterior.stored in place of video
    captions: list[str] | None = None
    negative: list[str] | None = None  # replaces "" where text is dropped
    text: Tensor | None = None  # (B, L, D) cached embeddings
    text_mask: Tensor | None = None  # (B, L) bool
    no_text: Tensor | None = None  # (B, L, D) that of the empty caption, where text is dropped
    no_text_mask: Tensor | None = None  # (B, L) bool
    image: Tensor | None = None  # (B, 3, N, H, W) condition frames; None: taken from the video
    scalars: dict[str, Tensor] = field(default_factory=dict)  # each (B,), names in SCALARS
    ids: list[str] = field(default_factory=list)
    epoch: int = 0
    position: Tensor | None = None  # (B,) int64, place in the epoch's global order: keys randomness
    bad: list[str] = field(default_factory=list)  # items skipped for this batch, "id: reason"

    @property
    def size(self) -> int:
        return len(self.ids)


@dataclass
class Conditions:
    """What a backbone is told besides z_t and t; absent is None. Registered as a pytree by the
    system.
    """

    context: Tensor | None = None  # (B, L, D)
    context_mask: Tensor | None = None  # (B, L) bool, True is a real token
    image_context: Tensor | None = None  # (B, T or 1, N, D)
    concat: Tensor | None = None  # (B, C', T, H, W)
    vector: Tensor | None = None  # (B, D)
    scalars: dict[str, Tensor] = field(default_factory=dict)  # each (B,)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is there, with its name."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                yield from value.items()
            elif value is not None:
                yield f.name, value


@dataclass
class Terms:
    """A loss: `total` () to be differentiated, `per_sample` (B,), and what is logged under
    published names.
    """

    total: Tensor
    per_sample: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)  # each ()


@dataclass
class Denoised:
    """What a raw output says, each (B, C, T, H, W): clean latents, noise, and log-variance where it
    is learned.
    """

    z0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None


class Draws(Protocol):
    """All randomness of a step, by name. The same name gives the same numbers; a new name shifts no
    other.
    """

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal of shape, dtype and device of `like`, whose first axis is the batch."""
        ...

    def uniform(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1), independent."""
        ...

    def stratified(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1), each uniform, together one in each of G equal parts for the G
        clips of an optimizer step.
        """
        ...

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """(B,) int64 in [low, high)."""
        ...

    def shared(self) -> Draws:
        """The same interface with one value for the whole micro-batch (some published steps do
        that).
        """
        ...


class Posterior(Protocol):
    """What a first stage says about x. Gaussian; VQ and identity ignore the noise."""

    is_random: bool  # False: `sample` ignores the noise, which then need not be drawn
    stored: Tensor  # (B, P, T, H, W) mean and log-variance, features or pixels: what a cache keeps
    mean: Tensor  # (B, C, T, H, W) unscaled

    def sample(self, noise: Tensor) -> Tensor: ...  # (B, C, T, H, W) unscaled; noise is like mean
    def kl(self) -> Tensor: ...  # (B,) summed over the rest; zeros where there is no distribution


class FirstStage(Protocol):
    """Scale and shift live here; windows, slices, chunks and tiles inside encode and decode."""

    def encode(self, x: Tensor) -> Posterior: ...  # x (B, 3, T, H, W) in [-1, 1]
    def posterior(self, stored: Tensor) -> Posterior: ...  # the same from a cache
    def scaled(self, z: Tensor) -> Tensor: ...  # unscaled -> what the backbone sees

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled z -> (B, 3, T, H, W)."""
        ...


class Backbone(Protocol):
    """t (B,) lies in [0, 1000), whole or broken; out is (B, outputs * C, T, H, W)."""

    def __call__(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor: ...


Encode = Callable[["Tensor", str], "Tensor"]  # (pixels, name of the draw) -> scaled latents


class Conditioner(Protocol):
    """`drop` holds the published joint rule; what is dropped is replaced before it is encoded."""

    def drop(self, draws: Draws) -> dict[str, Tensor]: ...  # signal -> (B,) bool

    def __call__(
        self,
        batch: Batch,
        grid: Clip,
        drop: dict[str, Tensor],
        draws: Draws,
        encode: Encode,
        z0: Tensor | None,  # None when sampling
    ) -> Conditions: ...


class Schedule(Protocol):
    """z_t = alpha(t) z0 + sigma(t) eps. t is in the schedule's own unit: (B,) int64, or float32 in
    [0, 1].
    """

    def draw_t(self, draws: Draws) -> Tensor: ...
    def alpha(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1) float32
    def sigma(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1) float32
    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...  # what the backbone gets
    def noised(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def denoised(self, out: Tensor, z_t: Tensor, t: Tensor) -> Denoised: ...
    def weight(self, t: Tensor) -> Tensor: ...  # (B,) loss weight, ones where there is none
    def snr(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1), before a published rescaling of z0
    def times(self, steps: int, spacing: str) -> Tensor: ...  # decreasing, from the noisiest


class Loss(Protocol):
    def __call__(
        self, schedule: Schedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms: ...


class Guidance(Protocol):
    """A wrapper around the model: which passes, and how raw outputs (variance channels included)
    combine.
    """

    def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]: ...
    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor: ...


class Hooks(Protocol):
    """Called by a sampler: `before` a model call (known regions), on the `denoised` estimate
    (quantising, previews).
    """

    def before(self, z_t: Tensor, t: Tensor) -> Tensor: ...
    def denoised(self, d: Denoised, t: Tensor) -> Denoised: ...


class Sampler(Protocol):
    """Solves from `z` (B, C, T, H, W), standard normal, with `model(z_t, t, step) -> raw output`.

    `step` counts from 0 to steps - 1; a second call within one step repeats its number.
    """

    def __call__(
        self,
        model: Callable[[Tensor, Tensor, int], Tensor],
        schedule: Schedule,
        z: Tensor,
        steps: int,
        draws: Draws,
        hooks: Hooks | None = None,
    ) -> Tensor: ...


# "video" (3, T, H, W) float32 in [-1, 1], or "stored" (P, T, H, W); others of SAMPLE_TENSORS;
# "caption" str; names in SCALARS: float
Sample = dict[str, Any]


class Items(Protocol):
    """One split of a data set; index in [0, len)."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        """`rng` is keyed by (seed, epoch, id): the only source of randomness. Raises BadItem."""
        ...


@runtime_checkable
class Bucketed(Protocol):
    """Items of several sizes; a micro-batch holds one of them."""

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        """Size of the clip that `load` makes with the same `rng`: these are its first draws.

        It decodes nothing and raises nothing; an item that cannot be read has any of the sizes.
        """
        ...


@runtime_checkable
class Hashed(Protocol):
    """Items that know what a clip is made from without making it (task=encode asks)."""

    def content(self, index: int) -> str:
        """A hash of all that is read for the clip; raises BadItem."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """A conditioner whose Config says `embeds`."""

    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, and (B, L) True for real tokens."""
        ...


class DataSource(Protocol):
    """What `data=` builds."""

    def split(self, name: str) -> Items:
        """ "train", or "val" (never shares a source with train; its items do not use `rng`). Raises
        DataError.
        """
        ...

    def prompts(self) -> list[str]:
        """Captions to sample and to score with, in a fixed order; empty where there are none."""
        ...


class Metric(Protocol):
    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Learns what it must from real training clips: (N, 3, T, H, W) in [-1, 1]."""
        ...

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Scores by name for clips (N, 3, T, H, W) made for `captions`."""
        ...

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        """Clips that a researcher compares with, by name: {"mean clip": (N, 3, T, H, W)}."""
        ...

    def proportions(self) -> frozenset[str]:
        """Scores that are shares of the N clips, whose interval follows from N alone."""
        ...

    def meaning(self) -> dict[str, str]:
        """One line for each score: what it measures, what chance and what perfect is."""
        ...


@runtime_checkable
class PerClipMetric(Protocol):
    """A metric that also judges clip by clip, so that a report can resample prompts."""

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) for each score that is a mean over clips."""
        ...


@runtime_checkable
class PairedMetric(Metric, Protocol):
    """A metric that compares each clip with the real one in whose place it stands."""

    def set_references(self, real: Tensor) -> None:
        """The real clips (N, 3, T, H, W), before `score` of clips for the same N captions."""
        ...


class Adapter(Protocol):
    def apply(self, backbone: Any, targets: tuple[str, ...], dtype: Any) -> None:
        """Freezes `backbone`, in `dtype`, and gives it weights of its own, which train in float32.

        Its own names stay as they are but for what the adapter puts between them: `published_name`
        takes that away, and is None for weights of the adapter.
        """
        ...

    def published_name(self, name: str) -> str | None: ...

    def exported(self, backbone: Any) -> tuple[str, State, dict[str, str]]:
        """A file for other programs: its name, tensors, and the text in its header."""
        ...

    def merge(self, backbone: Any) -> None:
        """Adds what the adapter has learned to the backbone's own weights."""
        ...


State = dict[str, "Tensor"]


class Layout(Protocol):
    """A published file format of a whole system; `split` and `join` are pure and inverse to one
    another.
    """

    def split(self, state: State) -> dict[str, State]:
        """{"backbone": its state, "vae", "conditioning", "ema", "schedule", "loss"}.

        Names are those of our modules; parts that the file has not are empty. `ema` is the average
        of the backbone with `decay` and `num_updates`, `schedule` the tables that a schedule with a
        method `tables()` makes. Raises StorageError for names of another format.
        """
        ...

    def join(self, parts: dict[str, State]) -> State: ...

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """What the original's loader reads, of a model trained for `steps` optimizer steps."""
        ...
