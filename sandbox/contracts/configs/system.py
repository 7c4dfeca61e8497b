"""Configs of components with weights, of adapters and of published file formats."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.sizes import Clip, Hidden, Slots


@dataclass(frozen=True)
class FirstStageRecipe:
    """Training settings of a first stage for vae.weights=auto; task=train_vae defaults to them.

    `reconstruction`: settings of the loss that differ from its defaults.
    """

    lr: float = 2e-3
    steps: int = 1000
    batch_size: int = 32
    reconstruction: Mapping[str, float] = field(default_factory=dict)


@dataclass
class FirstStageConfig(PluginConfig, ABC):
    """The autoencoder between pixels and latents.

    weights: "auto" (cached, or trained first), a file, or null (random); one_by_one: training
    encodes clips one at a time, as task=encode does, so that latents are bitwise independent of
    the other clips of the batch.
    """

    may_differ: ClassVar[tuple[str, ...]] = ("weights", "one_by_one")
    weights: str | None = "auto"
    one_by_one: bool = False

    def files(self) -> dict[str, str | None]:
        return {} if self.weights in (None, "auto") else {"weights": self.weights}

    @abstractmethod
    def latents(self, clip: Clip) -> Clip:
        """Size of the latents of a clip of pixels; raises SizeError for an unsupported size."""

    def fitted(self) -> str:
        """How the weights are obtained: "none" (no weights), "closed_form" (`fit`) or "trained"."""
        return "trained"

    def regularizer(self) -> str:
        """Regulariser of the latents, and default reconstruction plugin: "kl" or "codebook"."""
        return "kl"

    def recipe(self) -> FirstStageRecipe:
        """Settings that train it in about a minute on the default data."""
        return FirstStageRecipe()


@dataclass
class BackboneConfig(PluginConfig, ABC):
    """The denoising network."""

    def takes(self) -> frozenset[str]:
        """Names of slots and scalars that it can use with these settings."""
        return frozenset()

    def needs(self) -> frozenset[str]:
        """The subset of `takes` that it requires."""
        return frozenset()

    def grid(self, z: Clip) -> Clip:
        """Latent size that it processes: `z`, or more frames (front padding); raises SizeError."""
        return z

    @abstractmethod
    def wired(self, z: Clip, slots: Slots, outputs: int) -> Self:
        """The complete config for latents `z`, filled by `agree`; raises ConfigError.

        `outputs`: output channels per latent channel.
        """

    def takes_frame_times(self) -> bool:
        """Whether it accepts a time for each frame, t (B, T), with these settings."""
        return False

    def caches_frames(self) -> bool:
        """Whether frames depend on earlier ones only, so that `Conditions.past` replaces these."""
        return False

    def takes_time_scalars(self) -> bool:
        """Whether it embeds further numbers in the unit of its time, which a method names.

        `wired` finds them in `slots.time_scalars`.
        """
        return False

    def blocks(self) -> tuple[str, ...]:
        """Names of its blocks, in order: modules whose output has the shape of their input."""
        return ()

    def hidden(self, block: str) -> Hidden | None:
        """The output of one of `blocks`; None where a method cannot read it."""
        return None

    def layers(self) -> tuple[str | None, int]:
        """The setting with the number of identical layers (or None), and their repeat period.

        task=plan then measures a few layers and extrapolates.
        """
        return None, 1

    def adapter_targets(self) -> tuple[str, ...]:
        """Default LoRA targets, as suffixes of module names."""
        return ()

    def additions(self) -> tuple[str, ...]:
        """Name fragments of zero-initialised weights, such as ".motion.".

        init_from accepts weights without them.
        """
        return ()

    def has_matrices(self) -> bool:
        """Whether its blocks have 2-D weights, which Muon requires."""
        return True


@dataclass
class ConditioningConfig(PluginConfig):
    """Computes Conditions from a batch."""

    def needs(self) -> frozenset[str]:
        """Batch fields that it reads: "captions", "image", "fps", ..."""
        return frozenset()

    def encodes(self) -> bool:
        """Whether it calls the first stage during training."""
        return False

    def embeds(self) -> bool:
        """Whether a frozen network embeds captions (`encoded`), so that they can be cached."""
        return False

    def signals(self) -> tuple[str, ...]:
        """Names of the conditions that can be dropped: ("text", "image")."""
        return ()

    def images(self) -> tuple[str, ...]:
        """Images of a prompt in addition to its caption: (), ("start",) or ("start", "end").

        ("video",): other frames of a clip, those of `known_frames`.
        """
        return ()

    def known_frames(self, frames: int) -> tuple[int, ...]:
        """The frames of a clip of `frames` frames that `images` are, in their order."""
        return (0, frames - 1)[: len(self.images())]

    def labelled(self, count: int) -> Self:
        """The complete config for labels below `count`, if it needs "label"; raises ConfigError."""
        return self

    def offers(self, clip: Clip, grid: Clip) -> Slots:
        """The conditions that the backbone receives."""
        return Slots()

    def wired(self, clip: Clip, grid: Clip) -> Self:
        """The complete config, filled by `agree`."""
        return self


@dataclass
class FeaturesConfig(PluginConfig, ABC):
    """A frozen encoder of clean frames, with whose features a training method compares its own."""

    @abstractmethod
    def channels(self) -> int:
        """Channels of its features."""

    def fit_clips(self) -> int:
        """Training clips that `fit` receives before the first step; 0: it has no `fit`."""
        return 0

    def needs(self) -> frozenset[str]:
        """Batch fields that `fit` reads besides the video: "captions"."""
        return frozenset()


@dataclass
class AdapterConfig(PluginConfig):
    """A small set of weights that is trained while the backbone stays frozen."""

    def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
        """Problems with this wired backbone, one line each."""
        yield from ()


@dataclass(frozen=True)
class ReleasedClass:
    """How the settings of a published class become those of a plugin.

    Names of nested settings are joined by dots; settings with equal names need no entry.
    plugin: such as "backbone/unet2d"; "vae/*" adds to the first stage of the same file.
    names: their name -> ours; "betas.0" is an element, "count#" the length of a list.
    values: their name -> {their value: ours}. fixed: settings of which one value is supported.
    ignored: settings without an effect on the component. switches: setting -> those that have an
    effect only where it is true. defaults: what a file that leaves a setting out means.
    sets: settings of ours that every file of this class has. single: settings with a list of at
    most one number per level, which is that number, or 0, here. variants: (their name, {value:
    plugin}). rest_ignored: all other settings are ignored.
    """

    plugin: str
    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    variants: tuple[str, Mapping[Any, str]] | None = None
    rest_ignored: bool = False


@dataclass
class LayoutConfig(PluginConfig):
    """A published file format of a full system."""

    def published_classes(self) -> Mapping[str, tuple[ReleasedClass, ...]]:
        """By published class, or section of a file: the components that its settings describe."""
        return {}

    def recognises(self, names: frozenset[str]) -> bool:
        """Whether a state with these names has this layout."""
        return False
