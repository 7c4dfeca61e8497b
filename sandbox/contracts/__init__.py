"""Interfaces between components: sizes, slots, errors, base Configs and tensor Protocols.

The Config side (`configs`) answers all questions before a run (compatible sizes, connections,
cost) in plain Python and never imports torch. The tensor side (`tensors`, and `video` for raw
video) defines the calls of the training step and the samplers. A plugin imports this package and
never a plugin of another group.
"""

# ruff: noqa: F401  re-exports

from sandbox.contracts.checks import above, in_range, is_path, must_divide, one_of, same_length
from sandbox.contracts.configs.base import ADDED, PluginConfig, added
from sandbox.contracts.configs.data import LOADING, DataConfig, MetricConfig, StageConfig
from sandbox.contracts.configs.diffusion import (
    AVERAGE,
    FROZEN,
    FULL,
    STUDENT,
    TRAINED,
    GuidanceConfig,
    LossConfig,
    MethodConfig,
    Pass,
    Role,
    SamplerConfig,
    ScheduleConfig,
)
from sandbox.contracts.configs.system import (
    AdapterConfig,
    BackboneConfig,
    ConditioningConfig,
    FeaturesConfig,
    FirstStageConfig,
    FirstStageRecipe,
    LayoutConfig,
    ReleasedClass,
)
from sandbox.contracts.configs.task import WEIGHTS, TaskConfig, weights_file, weights_problems
from sandbox.contracts.configs.training import (
    CallbackConfig,
    CheckpointConfig,
    EMAConfig,
    LRScheduleConfig,
    OptimizerConfig,
    Snapshot,
    TrainerConfig,
)
from sandbox.contracts.errors import (
    BadItem,
    ConfigError,
    DataError,
    Diverged,
    PluginError,
    PluginFault,
    Preempted,
    SandboxError,
    SizeError,
    StorageError,
)
from sandbox.contracts.items import Bucketed, DataSource, Hashed, Items, Labelled, Sample
from sandbox.contracts.sizes import LABEL, NUMBERS, SCALARS, SIZES, Clip, Hidden, Slots, Tokens
from sandbox.contracts.tensors import (
    SAMPLE_TENSORS,
    Adapter,
    Backbone,
    Batch,
    Conditioner,
    Conditions,
    CriticMethod,
    Denoised,
    Draws,
    Encode,
    Example,
    Features,
    FirstStage,
    Guidance,
    Hooks,
    Layout,
    Loss,
    Method,
    Metric,
    Model,
    Output,
    PairedMetric,
    PerClipMetric,
    Posterior,
    Sampler,
    Schedule,
    State,
    Terms,
    TextEncoder,
)
from sandbox.contracts.video import (
    CuttingStage,
    DecidingStage,
    Rendering,
    RenderingStage,
    Row,
    ScoringStage,
    Span,
    VideoClip,
    VideoFile,
)

# Former names, for plugins outside this repository.
Beside = PairedMetric
ByClip = PerClipMetric
Cuts = CuttingStage
Footage = VideoClip
Judges = DecidingStage
Looks = ScoringStage
Misfit = SizeError
Renders = RenderingStage
