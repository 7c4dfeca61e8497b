"""Configs of the parts that hold weights, of what is added to them, and of how they are filed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.sizes import Clip, Slots


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
        """Size of the latents of a clip of pixels; raises SizeError where the clip does not fit."""

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
        """Latent size that it processes: `z`, or more frames (front padding); raises SizeError."""
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
