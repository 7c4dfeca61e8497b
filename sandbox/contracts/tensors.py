"""Tensor interfaces: the calls that the training step and the samplers make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sandbox.contracts.configs.diffusion import STUDENT, GuidanceConfig, MethodConfig, Pass
from sandbox.contracts.sizes import Clip

if TYPE_CHECKING:
    from torch import Tensor


# Keys of a sample that become the Batch fields of the same name (without the batch axis).
SAMPLE_TENSORS = ("video", "stored", "image", "text", "text_mask", "no_text", "no_text_mask")


@dataclass
class Batch:
    """One micro-batch of B clips of one size.

    Not frozen: Lightning moves batches between devices by assignment.
    """

    video: Tensor | None = None  # (B, 3, T, H, W) in [-1, 1]
    stored: Tensor | None = None  # (B, P, T, H, W) cached Posterior.stored, replaces video
    captions: list[str] | None = None
    negative: list[str] | None = None  # negative prompts, used instead of "" for dropped text
    text: Tensor | None = None  # (B, L, D) cached embeddings
    text_mask: Tensor | None = None  # (B, L) bool
    no_text: Tensor | None = None  # (B, L, D) embedding of the empty caption, for dropped text
    no_text_mask: Tensor | None = None  # (B, L) bool
    image: Tensor | None = None  # (B, 3, N, H, W) condition frames; None: taken from the video
    scalars: dict[str, Tensor] = field(default_factory=dict)  # each (B,), names in NUMBERS
    ids: list[str] = field(default_factory=list)
    epoch: int = 0
    position: Tensor | None = None  # (B,) int64 index in the epoch's global order; keys randomness
    bad: list[str] = field(default_factory=list)  # items skipped for this batch, "id: reason"

    @property
    def size(self) -> int:
        return len(self.ids)


@dataclass
class Conditions:
    """Inputs of a backbone other than z_t and t; absent ones are None.

    The system registers this class as a pytree.
    """

    context: Tensor | None = None  # (B, L, D)
    context_mask: Tensor | None = None  # (B, L) bool, True for real tokens
    image_context: Tensor | None = None  # (B, T or 1, N, D)
    concat: Tensor | None = None  # (B, C', T, H, W)
    vector: Tensor | None = None  # (B, D)
    scalars: dict[str, Tensor] = field(default_factory=dict)  # each (B,)
    past: Any = None  # keys and values of earlier frames, where the Config's `caches_frames` allows

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every condition that is present."""
        for f in fields(self):
            value = getattr(self, f.name) if f.name != "past" else None
            if isinstance(value, dict):
                yield from value.items()
            elif value is not None:
                yield f.name, value


@dataclass
class Terms:
    """A loss: `total` () for backward, `per_sample` (B,), and logged values by published name."""

    total: Tensor
    per_sample: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)  # each ()


@dataclass
class Denoised:
    """Estimates from a raw model output, each (B, C, T, H, W): clean latents and noise.

    `log_variance` is set where the model learns the variance.
    """

    z0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None


class Draws(Protocol):
    """All random numbers of a step, by name.

    The same name gives the same numbers; adding a name changes no other draw.
    """

    def normal(self, name: str, like: Tensor) -> Tensor:
        """Standard normal with the shape, dtype and device of `like` (batch axis first)."""
        ...

    def uniform(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1), independent."""
        ...

    def stratified(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1), each uniform.

        The G clips of an optimizer step fall into G equal intervals, one each.
        """
        ...

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """(B,) int64 in [low, high)."""
        ...

    def shared(self, over: str = "micro_batch") -> Draws:
        """The same interface with one value for all clips of the micro-batch.

        Some published training steps need it. over="step": of the optimizer step, on all processes.
        """
        ...


class Posterior(Protocol):
    """The latent distribution of x: Gaussian, or a point (VQ and identity ignore the noise)."""

    is_random: bool  # False: `sample` ignores the noise, which need not be drawn
    stored: Tensor  # (B, P, T, H, W) what a cache keeps: mean and log-variance, features or pixels
    mean: Tensor  # (B, C, T, H, W) unscaled

    def sample(self, noise: Tensor) -> Tensor: ...  # (B, C, T, H, W) unscaled; noise like mean
    def kl(self) -> Tensor: ...  # (B,) summed over the other axes; zeros for a point


class FirstStage(Protocol):
    """An autoencoder. It owns scale and shift, and windows, slices, chunks and tiles."""

    def encode(self, x: Tensor) -> Posterior: ...  # x (B, 3, T, H, W) in [-1, 1]
    def posterior(self, stored: Tensor) -> Posterior: ...  # the same from a cache
    def scaled(self, z: Tensor) -> Tensor: ...  # unscaled latents -> latents of the backbone

    def decode(self, z: Tensor, draws: Draws | None = None) -> Tensor:
        """Scaled z -> (B, 3, T, H, W)."""
        ...


class Backbone(Protocol):
    """Denoiser: returns (B, outputs * C, T, H, W).

    t (B,), integer or float, comes from `Schedule.inputs`: in [0, 1000), or in [0, timesteps) of a
    discrete schedule. It is never a time in [0, 1].
    It is (B, T), one time for each frame, where the Config's `takes_frame_times` allows it.
    """

    def __call__(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor: ...


Encode = Callable[["Tensor", str], "Tensor"]  # (pixels, name of the draw) -> scaled latents


class Conditioner(Protocol):
    """Computes conditions. `drop` draws the published joint dropping rule.

    Dropped inputs are replaced before they are encoded.
    """

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
    """z_t = alpha(t) z0 + sigma(t) eps.

    t is in the unit of the schedule: int64, or float32 in [0, 1]. It is (B,), or (B, T) with one
    time for each frame: alpha, sigma and snr are then (B, 1, T, 1, 1) and weight is (B, T).
    """

    def draw_t(self, draws: Draws) -> Tensor: ...
    def alpha(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1) float32
    def sigma(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1) float32
    def inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...  # backbone inputs
    def noised(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def denoised(self, out: Tensor, z_t: Tensor, t: Tensor) -> Denoised: ...
    def weight(self, t: Tensor) -> Tensor: ...  # (B,) loss weight; ones by default
    def snr(self, t: Tensor) -> Tensor: ...  # (B, 1, 1, 1, 1), before a published rescaling of z0
    def times(self, steps: int, spacing: str) -> Tensor: ...  # decreasing, noisiest first


class Loss(Protocol):
    def __call__(
        self, schedule: Schedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms: ...


@dataclass
class Output:
    """What a network returns: its raw output and the hidden features that were requested."""

    raw: Tensor  # (B, outputs * C, T, H, W)
    features: dict[str, Tensor] = field(default_factory=dict)  # by module name


class Example(Protocol):
    """One micro-batch in a training step; everything is computed when it is first read."""

    @property
    def z0(self) -> Tensor:
        """Scaled latents (B, C, T, H, W)."""
        ...

    @property
    def video(self) -> Tensor | None:
        """Pixels (B, 3, T, H, W) in [-1, 1]; None with cached latents."""
        ...

    @property
    def features(self) -> Tensor:
        """(B, D, T, h, w): the group `features` of the frames that belong to those of z0."""
        ...

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the conditions that can be dropped."""
        ...

    def conditions(self, drop: frozenset[str] | None = None, role: str = STUDENT) -> Conditions:
        """The conditions of the micro-batch, encoded by the conditioning of the network `role`.

        drop: signals to drop in every clip; None drops them at random, as the conditioning does in
        training.
        """
        ...


class Features(Protocol):
    """A frozen encoder of images, a module.

    With `fit_clips`, its weights are buffers, which checkpoints keep, and
    fit(clips (N, 3, T, H, W) in [-1, 1], captions) sets them, the same in every process.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D, h, w), without gradients."""
        ...


class Model(Protocol):
    """The networks, schedule and loss that a training method works with."""

    loss: Loss

    @property
    def schedule(self) -> Schedule:
        """That for the size of the micro-batch's latents."""
        ...

    def __call__(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Conditions,
        features: tuple[str, ...] = (),
        scalars: Mapping[str, Tensor] | None = None,
        role: str = STUDENT,
    ) -> Output:
        """One call of a denoiser. t: (B,), or (B, T) where the backbone takes frame times.

        features: names of backbone modules whose outputs are returned, those of blocks as
        (B, d, t, h, w) where the backbone's Config knows their axes (`hidden`). scalars: all
        numbers that the method's `scalars` names, each (B,) in the unit of t. role: the network,
        whose own `conditions` these are; the EMA is called without gradients.
        """
        ...


class Method(Protocol):
    """A training method: all model calls of a training step, and the loss that they make."""

    cfg: MethodConfig

    def __call__(self, model: Model, example: Example, draws: Draws) -> Terms: ...


class CriticMethod(Method, Protocol):
    """A method whose Config has TRAINED roles."""

    def update(self, role: str, turn: int, model: Model, example: Example, draws: Draws) -> Terms:
        """The loss of a trained role, in its update number `turn` after one of the student.

        Only the weights of that role have gradients.
        """
        ...


class Guidance(Protocol):
    """The model passes of a sampling step and how their raw outputs are combined.

    Raw outputs include variance channels. `passes` is called before each sampling run, so state
    that is kept between steps starts there.
    """

    cfg: GuidanceConfig

    # a frozenset, as before version 0.2, is a pass that drops these signals
    def passes(self, signals: tuple[str, ...]) -> tuple[Pass | frozenset[str], ...]: ...

    def combine(self, outs: list[Tensor], t: Tensor, step: int, steps: int) -> Tensor:
        """One raw output from those of the passes that `cfg.active` returns, in their order."""
        ...


class Hooks(Protocol):
    """Callbacks of a sampler.

    `before` edits z_t before a model call (known regions); `denoised` edits or observes the
    estimate (quantising, previews).
    """

    def before(self, z_t: Tensor, t: Tensor) -> Tensor: ...
    def denoised(self, d: Denoised, t: Tensor) -> Denoised: ...


class Sampler(Protocol):
    """Integrates from standard normal `z` (B, C, T, H, W) with `model(z_t, t, step) -> raw output`.

    `step` counts from 0 to steps - 1; a second model call within a step repeats its number. A
    fourth argument has the numbers that the Config's `scalars` names: {name: (B,)}, in the unit of
    t. `past=` has the keys and values of the frames before those of z_t.
    """

    def __call__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        z: Tensor,
        steps: int,
        draws: Draws,
        hooks: Hooks | None = None,
    ) -> Tensor: ...


@runtime_checkable
class TextEncoder(Protocol):
    """A conditioner whose Config has `embeds()`."""

    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32 and a mask (B, L), True for real tokens."""
        ...


class Metric(Protocol):
    def fit(self, video: Tensor, captions: list[str]) -> None:
        """Fits the metric to real training clips (N, 3, T, H, W) in [-1, 1]."""
        ...

    def score(self, video: Tensor, captions: list[str]) -> dict[str, float]:
        """Scores by name of clips (N, 3, T, H, W) generated for `captions`."""
        ...

    def baselines(self, captions: list[str]) -> dict[str, Tensor]:
        """Baseline clips to compare with, by name: {"mean clip": (N, 3, T, H, W)}."""
        ...

    def proportions(self) -> frozenset[str]:
        """Scores that are proportions of the N clips; N alone determines their interval."""
        ...

    def meaning(self) -> dict[str, str]:
        """One line for each score: what it measures, its chance level and its best value."""
        ...


@runtime_checkable
class PerClipMetric(Protocol):
    """A metric that also scores each clip, so that a report can resample prompts."""

    def per_clip(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) values of each score that is a mean over clips."""
        ...


@runtime_checkable
class PairedMetric(Metric, Protocol):
    """A metric that compares each clip with its real counterpart."""

    def set_references(self, real: Tensor) -> None:
        """Real clips (N, 3, T, H, W); call it before `score` of clips for the same N captions."""
        ...


class Adapter(Protocol):
    def apply(self, backbone: Any, targets: tuple[str, ...], dtype: Any) -> None:
        """Freezes `backbone` in `dtype` and adds adapter weights, which train in float32.

        Names of the backbone's parameters change only by the adapter's insertions.
        `published_name` removes these, and returns None for weights of the adapter.
        """
        ...

    def published_name(self, name: str) -> str | None: ...

    def exported(self, backbone: Any) -> tuple[str, State, dict[str, str]]:
        """A file for other programs: its name, its tensors and its text metadata."""
        ...

    def merge(self, backbone: Any) -> None:
        """Adds the learned update to the weights of the backbone."""
        ...


State = dict[str, "Tensor"]


class Layout(Protocol):
    """A published file format of a full system; `split` and `join` are pure and inverses."""

    def split(self, state: State) -> dict[str, State]:
        """States by component: "backbone", "vae", "conditioning", "ema", "schedule", "loss".

        Names are those of our modules; components that the file lacks are empty. "ema" holds the
        EMA of the backbone with `decay` and `num_updates`; "schedule" the tables that a schedule's
        `tables()` returns. Raises StorageError for names of another format.
        """
        ...

    def join(self, parts: dict[str, State]) -> State: ...

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """The object that the original code loads, for a model trained for `steps` steps."""
        ...
