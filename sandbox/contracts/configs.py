"""The Config side: what a plugin takes, needs and makes, answered in plain Python before a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from sandbox.contracts.checks import above, in_range, one_of
from sandbox.contracts.errors import ConfigError

# Of the pixels of a clip; the loader, and sampling, tell them of every clip.
SIZES = ("height", "width", "aspect_ratio")  # aspect_ratio: height / width
SCALARS = frozenset({"fps", "frame_stride", "ofs", *SIZES})


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


@dataclass
class PluginConfig:
    """Base of every plugin's `Config`. `plugin` ("vae/magvit") is written by the registry, never by
    a user.
    """

    imports: ClassVar[tuple[str, ...]] = ()  # slow packages of its; a multirun imports them once
    # Settings with other values of which a run's weights still mean the same: of training alone, of
    # memory, of sizes. Of vae, conditioning, backbone and schedule no other may differ.
    may_differ: ClassVar[tuple[str, ...]] = ()
    plugin: str = ""

    def problems(self) -> Iterator[str]:
        """Every bad range, choice, length or NaN, one line each, starting with the field:
        "act='relu': want ...".
        """
        yield from ()

    def files(self) -> dict[str, str | None]:
        """Settings that name a file or folder that must be there before a run, with their values.

        Relative ones are found from the folder that the run was started from. Those of task,
        conditioning, adapter, reconstruction, metric and data are looked for where the task uses
        them, not by `problems`: a configuration can be composed, shown, planned and verified
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
class FirstStageConfig(PluginConfig, ABC):
    """Between pixels and latents.

    weights: "auto" (cached, else trained first), a file, or null (random); one_by_one: training
    encodes clips one at a time, as task=encode does, so that their last bits depend on no other
    clip of the batch.
    """

    may_differ: ClassVar[tuple[str, ...]] = ("weights", "one_by_one")
    weights: str | None = "auto"
    one_by_one: bool = False

    def files(self) -> dict[str, str | None]:
        return {} if self.weights in (None, "auto") else {"weights": self.weights}

    @abstractmethod
    def latents(self, clip: Clip) -> Clip:
        """Size of the latents of a clip of pixels; raises Misfit where the clip does not fit."""

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
class BackboneConfig(PluginConfig, ABC):
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

    @abstractmethod
    def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
        """Complete config for latents `z`, by `agree`; `outputs` is channels out per channel in.
        Raises ConfigError.
        """

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

    def takes_turns(self) -> bool:
        """Whether micro-batches of each size come in turn, so that with as many of them a step has
        one of each; else in no order.
        """
        return False

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
class ScheduleConfig(PluginConfig, ABC):
    """The noise process: z_t = alpha(t) z0 + sigma(t) eps, and what the network predicts."""

    kind: ClassVar[str] = "discrete"  # or "continuous"

    def outputs(self) -> int:
        """Backbone channels per latent channel: 1, or 2 with a learned variance."""
        return 1

    @abstractmethod
    def predicts(self) -> str:
        """What the network's first channels are: "eps", "v", "x0" or "velocity" (eps - z0)."""

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
