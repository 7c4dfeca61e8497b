"""Configs of the diffusion process: schedule, loss, method, sampler, guidance."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from sandbox.contracts.checks import in_range
from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.configs.system import BackboneConfig, FeaturesConfig


@dataclass
class ScheduleConfig(PluginConfig, ABC):
    """The noise process z_t = alpha(t) z0 + sigma(t) eps, and the prediction target."""

    kind: ClassVar[str] = "discrete"  # or "continuous"

    def outputs(self) -> int:
        """Output channels of the backbone per latent channel: 1, or 2 with a learned variance."""
        return 1

    @abstractmethod
    def predicts(self) -> str:
        """The prediction target: "eps", "v", "x0", "velocity" (eps - z0), or "edm".

        "edm" is (z0 - c_skip x) / c_out for x = z_t / alpha (Karras et al. 2022, eq. 8).
        """

    def takes_frame_times(self) -> bool:
        """Whether alpha, sigma, target, denoised and weight accept t (B, T)."""
        return False

    def ends_in_noise(self) -> bool:
        """Whether SNR(T) = 0. Then eps is uninformative at T, and sampling must start at T."""
        return False

    def depends_on_size(self) -> bool:
        """Whether the class has `for_size(grid)`: the schedule for latents of this size (a Clip).

        The training step and the samplers then use that schedule.
        """
        return False

    def finds_times(self) -> bool:
        """Whether the class has `time_of(level)`: t of noise levels sigma / alpha, same shape."""
        return False

    def spacing_problems(self, steps: int, spacing: str) -> Iterator[str]:
        """Problems with `times(steps, spacing)`, one line each.

        Unknown spacings, too many steps, or a spacing that does not reach T.
        """
        yield from ()


@dataclass
class LossConfig(PluginConfig):
    """The training loss of a prediction."""

    def takes_frame_times(self) -> bool:
        """Whether it accepts t (B, T)."""
        return False

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()


STUDENT = "student"  # the role of the network that is trained and sampled
FROZEN, AVERAGE, TRAINED = "frozen", "ema", "trained"  # kinds of the other roles


@dataclass(frozen=True)
class Role:
    """A network in addition to the student: a backbone with a conditioning of its own.

    kind: FROZEN has the weights at `weights`, a run folder or a weight file, which the setting
    `setting` names; AVERAGE is the EMA of the student; TRAINED starts as a copy of the role `start`
    and is updated `turns` times after each update of the student, with `lr` times its learning
    rate.
    """

    kind: str
    weights: str | None = None
    setting: str = ""
    start: str = STUDENT
    turns: int = 1
    lr: float = 1.0


@dataclass
class MethodConfig(PluginConfig):
    """The training method: the model calls of a training step."""

    def accepts(self, schedule: ScheduleConfig, loss: LossConfig) -> Iterator[str]:
        """Problems with this schedule and loss, one line each."""
        yield from ()

    def frame_times(self) -> bool:
        """Whether it gives each frame a time of its own."""
        return False

    def features(self) -> tuple[str, ...]:
        """Names of the backbone modules whose outputs it reads."""
        return ()

    def encodes_video(self) -> bool:
        """Whether it reads `example.features`, those of the group `features`."""
        return False

    def has_weights(self) -> bool:
        """Whether it has weights of its own: it is a module, whose weights train with the student.

        They are in checkpoints, not in exported weights.
        """
        return False

    def roles(self) -> Mapping[str, Role]:
        """The further networks that it uses, by name."""
        return {}

    def scalars(self) -> Mapping[str, float]:
        """Numbers that the network receives besides t, by name, each (B,) in the unit of t.

        The values are those of samplers that do not pass the number.
        """
        return {}

    def learns_guidance(self) -> bool:
        """Whether its target contains guidance, so that sampling must add none."""
        return False

    def forward_mode(self) -> bool:
        """Whether it takes forward-mode derivatives of the network."""
        return False

    def accepts_sampler(self, sampler: "SamplerConfig") -> Iterator[str]:
        """Problems with this sampler, one line each."""
        yield from ()

    def steps_problems(self, steps: int) -> Iterator[str]:
        """Problems of a sampler that passes `scalars` with this number of steps, one line each."""
        yield from ()

    def wired(self, backbone: BackboneConfig, features: FeaturesConfig | None) -> Self:
        """The complete config for this wired backbone and encoder; raises ConfigError."""
        return self


@dataclass
class SamplerConfig(PluginConfig):
    """Sampling from noise to latents in `steps` steps, at times from the schedule.

    A step is one model call, or two for second-order solvers.
    """

    steps: int = 20
    spacing: str = "trailing"

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from schedule.spacing_problems(self.steps, self.spacing)

    def problems(self) -> Iterator[str]:
        yield from in_range("steps", self.steps, 1, 10_000)

    def frame_times(self) -> bool:
        """Whether it gives each frame a time of its own."""
        return False

    def caches_frames(self) -> bool:
        """Whether it passes keys and values of earlier frames to the network."""
        return False

    def scalars(self) -> tuple[str, ...]:
        """Names of the numbers that it passes besides t; the method must train them."""
        return ()

    def recombines(self) -> bool:
        """Whether a step adds the estimates of z0 and noise, so that guidance may choose both."""
        return False


@dataclass(frozen=True)
class Pass:
    """One model pass of a sampling step.

    dropped: signals that the conditions lack. skip: names of backbone modules that return their
    input. role: the network, STUDENT or one of the guidance's `roles`.
    """

    dropped: frozenset[str] = frozenset()
    skip: tuple[str, ...] = ()
    role: str = STUDENT


FULL = Pass()


@dataclass
class GuidanceConfig(PluginConfig):
    """The passes of a sampling step and how they are combined."""

    def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
        """Problems with this schedule, one line each."""
        yield from ()

    def passes(self, signals: tuple[str, ...]) -> tuple[Pass | frozenset[str], ...]:
        """The passes, the full pass first: (FULL, Pass({"text"})).

        `signals`: those that can be dropped. Without any, classifier-free guidance has one pass.
        """
        return (FULL,)

    def chooses_noise(self) -> bool:
        """Whether it has `noise(outs, t, step, steps)`: the raw output whose noise a step adds.

        The clean estimate is that of `combine`.
        """
        return False

    def skipped(self) -> tuple[str, ...]:
        """Names of the backbone modules that a pass skips."""
        return ()

    def roles(self) -> Mapping[str, Role]:
        """The frozen networks that its passes use, by name."""
        return {}

    def wired(self, backbone: BackboneConfig) -> Self:
        """The complete config for this wired backbone; raises ConfigError."""
        return self

    def active(self, passes: tuple[Pass, ...], step: int, steps: int) -> tuple[Pass, ...]:
        """The passes that this step runs, in their order; `step` counts from 0."""
        return passes
