"""What components promise one another, in plain Python: sizes, slots, errors, base Configs and
tensor Protocols.

Two halves. The Config side answers every question before a run (does it fit, what goes where, what
does it cost) and never imports torch. The tensor side names the few calls that the training step
and the samplers make. A plugin sees this file and never another group's plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Of the pixels of a clip; the loader, and sampling, tell them of every clip.
SIZES = ("height", "width", "aspect_ratio")  # aspect_ratio: height / width
SCALARS = frozenset({"fps", "frame_stride", "ofs", *SIZES})
# What a sample may bring for the fields of a Batch of these names, without the axis B.
SAMPLE_TENSORS = ("video", "stored", "image", "text", "text_mask", "no_text", "no_text_mask")


# --- errors -------------------------------------------------------------------------------------
# ------------


class SandboxError(Exception):
    """An error that ends the program with its own exit code; survives pickling (all of it is in
    args).
    """

    exit_code: ClassVar[int] = 1


class ConfigError(SandboxError):
    """The user's settings are wrong (exit code 2); one line per problem, each with its cure."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class Misfit(ConfigError):
    """A clip does not fit a component: `field` (frames, height, width or channels) has `value`,
    `rule` says what fits.

    Wiring adds which setting that is and probes for the nearest values that fit.
    """

    def __init__(self, field: str, value: int, rule: str) -> None:
        Exception.__init__(self, field, value, rule)  # its one problem is made of them

    @property
    def field(self) -> str:
        return self.args[0]

    @property
    def value(self) -> int:
        return self.args[1]

    @property
    def rule(self) -> str:
        return self.args[2]

    @property
    def problems(self) -> tuple[str, ...]:
        return (str(self),)

    def __str__(self) -> str:
        return f"{self.field}={self.value}: want {self.rule}"


class PluginError(SandboxError):
    """A plugin is missing, broken, or there twice (exit code 2)."""

    exit_code = 2


class DataError(SandboxError):
    """The data are missing, empty, or worse than the limit allows (exit code 3)."""

    exit_code = 3


class Diverged(SandboxError):
    """The loss or a gradient is not finite (exit code 4)."""

    exit_code = 4


class StorageError(SandboxError):
    """A file cannot be written, or one that is read is broken or foreign (exit code 5)."""

    exit_code = 5


class Preempted(SandboxError):
    """The run was asked to stop, has saved, and continues when started again (exit code 75)."""

    exit_code = 75


class BadItem(Exception):
    """One item of a data set cannot be used (corrupt, too short); the loader skips, counts and
    lists it.
    """


# --- checks that Configs share
# ------------------------------------------------------------------------------


def one_of(name: str, value: Any, choices: Iterable[Any]) -> Iterator[str]:
    """Yields a problem unless `value` is among `choices`."""
    choices = list(choices)
    if value not in choices:
        yield f"{name}={value!r}: want one of {choices}"


def in_range(
    name: str, value: float | None, low: float, high: float = float("inf")
) -> Iterator[str]:
    """Yields a problem unless low <= value <= high; NaN is one, None (left to wiring) is not."""
    if value is not None and not low <= value <= high:
        allowed = f">= {low}" if high == float("inf") else f"{low} to {high}"
        yield f"{name}={value}: want {allowed}"


def above(name: str, value: float | None, low: float, high: float = float("inf")) -> Iterator[str]:
    """Yields a problem unless low < value <= high and value is finite; NaN is a problem, None is
    not.
    """
    if value is not None and not low < value <= min(high, 1e300):
        yield f"{name}={value}: want > {low}" + ("" if high == float("inf") else f" and <= {high}")


def is_path(name: str) -> bool:
    """Whether the name of weights is a file or folder here; "owner/model" is one on the hub."""
    ends = name.endswith((".bin", ".ckpt", ".pt", ".pth", ".safetensors"))
    return ends or name.startswith(("/", ".", "~")) or name.count("/") != 1


def same_length(name: str, value: Iterable[Any], length: int, of: str) -> Iterator[str]:
    """Yields a problem unless `value` has `length` entries, one for each `of`."""
    if len(list(value)) != length:
        yield f"{name} has {len(list(value))} entries: want {length}, one for each {of}"


def must_divide(field: str, value: int, by: int) -> None:
    """Raises Misfit unless `value` is a positive multiple of `by`."""
    if value < 1 or value % by:
        raise Misfit(field, value, f"a multiple of {by}")


# --- sizes and slots
# ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A size, of pixels or of latents: (channels, frames, height, width). An image has frames=1."""

    channels: int
    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Tokens:
    """A sequence that conditioning offers: `length` tokens of `width`, for each of `frames` (1: the
    same for all).
    """

    width: int
    length: int
    masked: bool = False
    frames: int = 1


@dataclass(frozen=True)
class Slots:
    """What conditioning offers a backbone. `concat` counts channels, `vector` is a width, 0 or None
    is absent.
    """

    context: Tokens | None = None
    image_context: Tokens | None = None
    concat: int = 0
    vector: int = 0
    scalars: frozenset[str] = frozenset()

    def names(self) -> frozenset[str]:
        """The filled slots and the scalars."""
        filled = {n for n in ("context", "image_context", "concat", "vector") if getattr(self, n)}
        return frozenset(filled) | self.scalars


# --- Configs
# ------------------------------------------------------------------------------------------------


@dataclass
class PluginConfig:
    """Base of every plugin's `Config`. `plugin` ("vae/magvit") is written by the registry, never by
    a user.
    """

    imports: ClassVar[tuple[str, ...]] = ()  # slow packages of its; a multirun imports them once
    plugin: str = ""

    def problems(self) -> Iterator[str]:
        """Every bad range, choice, length or NaN, one line each, starting with the field:
        "act='relu': want ...".
        """
        yield from ()

    def files(self) -> dict[str, str | None]:
        """Settings that name a file or folder that must be there before a run, with their values.

        Those of task, conditioning, reconstruction, metric and data are looked for where the task
        uses them, not by `problems`: a configuration can be composed, shown, planned and verified
        on a machine that has none of them. None: the setting must be given.
        """
        return {}

    def released(self) -> dict[str, Any]:
        """What describes it in a folder of diffusers: "_class_name" and the settings of that class.

        Empty where diffusers has no such class; raises ConfigError for settings that it has not.
        """
        return {}

    def agree(self, **numbers: int | None) -> Self:
        """A copy with the fields that are None filled from `numbers`.

        Raises ConfigError that names every field whose stated value differs from the number.
        """
        wrong = [
            f"{name}={getattr(self, name)}, but {number} is needed"
            for name, number in numbers.items()
            if getattr(self, name) not in (None, number)
        ]
        if wrong:
            raise ConfigError(*wrong)
        return replace(self, **numbers)


@dataclass(frozen=True)
class FirstStageRecipe:
    """How a first stage is trained where the run does not say (vae.weights=auto, and defaults of
    task=train_vae).

    `reconstruction`: settings of the loss that differ from its defaults.
    """

    lr: float = 2e-3
    steps: int = 1000
    batch_size: int = 32
    reconstruction: Mapping[str, float] = field(default_factory=dict)


@dataclass
class FirstStageConfig(PluginConfig):
    """Between pixels and latents.

    weights: "auto" (cached, else trained first), a file, or null (random); one_by_one: training
    encodes clips one at a time, as task=encode does, so that their last bits depend on no other
    clip of the batch.
    """

    weights: str | None = "auto"
    one_by_one: bool = False

    def latents(self, clip: Clip) -> Clip:
        """Size of the latents of a clip of pixels; raises Misfit where the clip does not fit."""
        raise NotImplementedError

    def fitted(self) -> str:
        """How this first stage gets its weights: "none" (has none), "closed_form" (`fit`) or
        "trained".
        """
        return "trained"

    def regularizer(self) -> str:
        """What its training holds the latents with, which is the plugin of group reconstruction:
        "kl" or "codebook".
        """
        return "kl"

    def recipe(self) -> FirstStageRecipe:
        """Learning rate, steps, batch and loss with which it trains in about a minute on the
        default data.
        """
        return FirstStageRecipe()


@dataclass
class BackboneConfig(PluginConfig):
    """The denoising network."""

    def takes(self) -> frozenset[str]:
        """Slot and scalar names that it can use with these settings."""
        return frozenset()

    def needs(self) -> frozenset[str]:
        """Those of `takes` that it cannot do without."""
        return frozenset()

    def grid(self, z: Clip) -> Clip:
        """Latent size that it works on: `z`, or more frames (padding in front); raises Misfit."""
        return z

    def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
        """Complete config for latents `z`, by `agree`; `outputs` is channels out per channel in.
        Raises ConfigError.
        """
        raise NotImplementedError

    def layers(self) -> tuple[str | None, int]:
        """The setting that says how many layers it has, where these are all alike, and after how
        many they repeat; task=plan then measures a few of them.
        """
        return None, 1

    def adapter_targets(self) -> tuple[str, ...]:
        """Default LoRA targets, as suffixes of module names."""
        return ()

    def additions(self) -> tuple[str, ...]:
        """Parts of the names of weights that add nothing at first, such as ".motion.".

        Weights of a network without them may begin a run (init_from).
        """
        return ()

    def has_matrices(self) -> bool:
        """Whether its blocks hold weights of two axes, which Muon and its like are made for."""
        return True


@dataclass
class ConditioningConfig(PluginConfig):
    """From a batch to Conditions."""

    def needs(self) -> frozenset[str]:
        """Batch fields that it reads: "captions", "image", "fps", ..."""
        return frozenset()

    def encodes(self) -> bool:
        """Whether it calls the first stage while training."""
        return False

    def embeds(self) -> bool:
        """Whether a frozen network turns captions into tokens, which can be stored: `encoded`."""
        return False

    def signals(self) -> tuple[str, ...]:
        """What can be dropped, by name: ("text", "image")."""
        return ()

    def images(self) -> tuple[str, ...]:
        """Pictures that a prompt brings beside its caption: (), ("start",) or ("start", "end")."""
        return ()

    def offers(self, clip: Clip, grid: Clip) -> Slots:
        return Slots()

    def wired(self, clip: Clip, grid: Clip) -> Self:
        """Complete config, by `agree`; default self."""
        return self


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

    def stored(self) -> str | None:
        """Folder that task=encode has filled, where batches bring stored latents and no pixels."""
        return None

    def whole(self) -> Self:
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
class ScheduleConfig(PluginConfig):
    """The noise process: z_t = alpha(t) z0 + sigma(t) eps, and what the network predicts."""

    kind: ClassVar[str] = "discrete"  # or "continuous"

    def outputs(self) -> int:
        """Backbone channels per latent channel: 1, or 2 with a learned variance."""
        return 1

    def predicts(self) -> str:
        """What the network's first channels are: "eps", "v", "x0" or "velocity" (eps - z0)."""
        raise NotImplementedError

    def ends_in_noise(self) -> bool:
        """Whether SNR(T) = 0; then eps says nothing at T, and a spacing must reach T."""
        return False

    def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
        """Problems with `times(steps, spacing)`, one line each: unknown spacings, too many steps, T
        not reached.
        """
        yield from ()


@dataclass
class LossConfig(PluginConfig):
    """From a prediction to a number."""

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()


@dataclass
class SamplerConfig(PluginConfig):
    """From noise to latents in `steps` calls of the model (or about twice as many, for second-order
    solvers), at times that the schedule spaces.
    """

    steps: int = 20
    spacing: str = "trailing"

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from schedule.spacing_problems(self.steps, self.spacing)

    def problems(self) -> Iterator[str]:
        yield from in_range("steps", self.steps, 1, 10_000)


@dataclass
class GuidanceConfig(PluginConfig):
    """How the passes of one sampling step are combined."""

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()

    def passes(self, signals: tuple[str, ...]) -> tuple[frozenset[str], ...]:
        """Signals dropped in each pass, the full pass first: ({}, {"text"}). One pass where nothing
        can be dropped.
        """
        return (frozenset(),)


@dataclass
class OptimizerConfig(PluginConfig):
    """How gradients change parameters. The peak learning rate is the top-level `lr`."""

    elementwise: ClassVar[bool] = True  # False: a number's change depends on others of its matrix

    def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
        """Problems with this wired backbone, one line each."""
        yield from ()


@dataclass
class LRScheduleConfig(PluginConfig):
    """The learning rate over a run, as a factor of the top-level `lr`."""

    def factor(self, step: int, steps: int) -> float:
        """Factor for optimizer step `step` (0 is the first) of a run of `steps`."""
        return 1.0


@dataclass
class TrainerConfig(PluginConfig):
    """Devices and the shape of an optimizer step.

    accelerator: auto, cpu, cuda or mps; processes: ranks, one a device; accumulate: micro-batches
    in one optimizer step; clip: largest gradient norm, null for none; threads: torch threads of a
    process on a CPU, null for what the loader's workers leave; log_every: optimizer steps between
    two lines of metrics; repeat: the first so many micro-batches come again and again, with the
    same noise (to see that a model can learn them), 0 for none; timeout: seconds that a process
    waits for the others; bad_step: what becomes of an optimizer step whose gradient is not finite,
    raise or skip; max_bad_steps: so many may be skipped; low_vram: the frozen first stage and text
    encoder wait on the CPU and are on the device for their part of a step alone, which changes no
    number and costs their transfer.
    """

    shards: ClassVar[bool] = False  # True: each process holds a part of the trained weights
    accelerator: str = "auto"
    processes: int = 1
    accumulate: int = 1
    clip: float | None = 1.0
    threads: int | None = None
    log_every: int = 20
    repeat: int = 0
    timeout: float = 600.0
    bad_step: str = "raise"
    max_bad_steps: int = 10
    low_vram: bool = False

    def problems(self) -> Iterator[str]:
        yield from one_of("accelerator", self.accelerator, ("auto", "cpu", "cuda", "mps"))
        for name in ("processes", "accumulate", "log_every"):
            yield from in_range(name, getattr(self, name), 1)
        yield from in_range("threads", self.threads, 1)
        yield from in_range("repeat", self.repeat, 0)
        yield from above("clip", self.clip, 0)
        yield from above("timeout", self.timeout, 0)
        yield from one_of("bad_step", self.bad_step, ("raise", "skip"))
        yield from in_range("max_bad_steps", self.max_bad_steps, 0)

    def accepts(self, optimizer: OptimizerConfig, precision: str) -> Iterator[str]:
        """Problems with this optimizer and precision, one line each."""
        yield from ()


@dataclass
class CheckpointConfig(PluginConfig):
    """When to save a checkpoint and which to keep. What one rule keeps, no other removes.

    every: optimizer steps between two; keep: newest ones; milestones: steps between those that are
    kept for good, or 0; best: so many with the lowest `best_of`, a metric that a callback measures
    at the same step, such as val/loss_ema; weights_every: steps between files of weights alone,
    which are kept for good and which nothing continues from, or 0; attempts, wait: how often a
    write is tried and the seconds in between.
    """

    every: int = 200
    keep: int = 2
    milestones: int = 0
    best: int = 0
    best_of: str = "val/loss_ema"
    weights_every: int = 0
    attempts: int = 3
    wait: float = 2.0

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name in ("every", "keep", "attempts"):
            yield from in_range(name, getattr(self, name), 1)
        for name in ("milestones", "best", "weights_every", "wait"):
            yield from in_range(name, getattr(self, name), 0, 1e9)


@dataclass
class EMAConfig(PluginConfig):
    """An average of the weights beside them."""

    def averages(self) -> bool:
        """Whether there is one, which is then measured as well (val/loss_ema)."""
        return True


@dataclass
class CallbackConfig(PluginConfig):
    """What else happens during training."""

    def measures(self, step: int) -> bool:
        """Whether it measures held-out clips after every optimizer step that `step` divides."""
        return False


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
class AdapterConfig(PluginConfig):
    """Few weights that are trained in place of the backbone's own, which stay as they are."""

    def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
        """Problems with this wired backbone, one line each."""
        yield from ()


@dataclass
class LayoutConfig(PluginConfig):
    """A published file format of a whole system."""

    def recognises(self, names: frozenset[str]) -> bool:
        """Whether a state with these names is of this layout."""
        return False


@dataclass
class TaskConfig(PluginConfig):
    """What a run does."""

    needs_torch: ClassVar[bool] = True  # False: works without a wired system
    checks: ClassVar[tuple[str, ...]] = ("task",)  # groups that such a task uses
    brings: ClassVar[tuple[str, ...]] = ()  # options where the command names none: "stage=[...]"
    trains_first_stage: ClassVar[bool] = False  # and nothing else
    # Folder of an earlier run that this task works on; its configuration is used.
    run: str | None = None

    def uses_run(self) -> bool:
        """Whether this task works on an earlier run (`run`, else the newest finished one)."""
        return False

    def takes_weights(self) -> bool:
        """Whether weights (`init_from`) and the configuration of the command may stand for a run
        where none is named.
        """
        return False

    def reads_data(self) -> bool:
        """Whether the files of `data` and of the first stage must be there before it starts."""
        return not self.uses_run()

    def micro_batch(self, data: DataConfig, first_stage: FirstStageConfig) -> int:
        """Clips per process and micro-batch."""
        return data.batch_size

    def defaults(self, first_stage: FirstStageConfig) -> dict[str, float]:
        """The `lr` and `steps` of the run where they are null."""
        return {"lr": 4e-3, "steps": 1200}


@dataclass
class StageConfig(PluginConfig):
    """One step of task=prepare, from a folder of raw videos to clips that can be trained on.

    `limits`: settings that decide no score. Changing one of them computes none again.
    `distributions`: packages whose versions the manifest names.
    """

    limits: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()

    def times(self, seconds: float) -> list[float]:
        """Seconds from the start of a clip of that length at which `look` will ask for frames."""
        return []


# --- raw video
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoFile:
    """What is in a video file. `fps` is its mean rate, `first` the time of the first frame in the
    unit of the stream, `variable` whether its rate changes, `rotation` degrees counter-clockwise
    that its frames are to be turned by; `width` and `height` are those of the upright picture.
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


class Footage(Protocol):
    """A span of a video file. Frames are (H, W, 3) uint8 RGB, upright, with square pixels.

    All that decodes raises BadItem for a file that is broken.
    """

    info: VideoFile
    start: float  # seconds from the first frame of the file

    @property
    def seconds(self) -> float: ...

    def at(self, times: Iterable[float]) -> list[np.ndarray]:
        """The frames shown at `times`, seconds from the start of the span."""
        ...

    def held(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """The same for times that increase, with one frame in memory at a time."""
        ...

    def stream(self, width: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
        """(time, frame) of every frame, at most `width` pixels wide."""
        ...


# "id", "source" (name below the folder), "path", "info" (VideoFile), "start", "end" (seconds),
# "scores" {stage: what its look found}, and what stages said of the clip: "caption", "split", ...
Row = dict[str, Any]
# (start, end) in seconds, and why it is dropped; "" where it is not
Span = tuple[float, float, str]


@dataclass(frozen=True)
class Rendering:
    """A clip as it is written: frames of one even size, their rate, and libx264's quality."""

    frames: Iterator[np.ndarray]
    fps: float
    crf: float


@runtime_checkable
class Looks(Protocol):
    """A stage that scores clips; in a worker, of one clip alone."""

    def look(self, clip: Footage) -> dict[str, Any]:
        """Scores by name, in plain containers. Raises BadItem."""
        ...


@runtime_checkable
class Cuts(Looks, Protocol):
    """A stage that makes several clips of one."""

    def spans(self, scores: dict[str, Any], seconds: float) -> list[Span]:
        """In order, without overlap, those that are dropped included."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A stage that decides, from the scores of all clips that are still kept."""

    def judge(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What it says of each row: {} nothing, {"drop": why}, or fields of the row to set."""
        ...


@runtime_checkable
class Renders(Protocol):
    """The stage that makes the clip that is written; in a worker."""

    def render(self, clip: Footage) -> Rendering: ...


# --- tensors
# ------------------------------------------------------------------------------------------------


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

    def rates(self) -> frozenset[str]:
        """Scores that are shares of the N clips, whose interval follows from N alone."""
        ...

    def meaning(self) -> dict[str, str]:
        """One line for each score: what it measures, what chance and what perfect is."""
        ...


@runtime_checkable
class ByClip(Protocol):
    """A metric that also judges clip by clip, so that a report can resample prompts."""

    def each(self, video: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """(N,) for each score that is a mean over clips."""
        ...


@runtime_checkable
class Beside(Metric, Protocol):
    """A metric that compares each clip with the real one in whose place it stands."""

    def beside(self, real: Tensor) -> None:
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
    """A published file format of a whole system; `parts` and `whole` are pure and inverse to one
    another.
    """

    def parts(self, state: State) -> dict[str, State]:
        """{"backbone": its state, "vae", "conditioning", "ema", "schedule", "loss"}.

        Names are those of our modules; parts that the file has not are empty. `ema` is the average
        of the backbone with `decay` and `num_updates`, `schedule` the tables that a schedule with a
        method `tables()` makes. Raises StorageError for names of another format.
        """
        ...

    def whole(self, parts: dict[str, State]) -> State: ...

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """What the original's loader reads, of a model trained for `steps` optimizer steps."""
        ...
