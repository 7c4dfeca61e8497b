"""Config of tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.configs.data import DataConfig
from sandbox.contracts.configs.system import FirstStageConfig

WEIGHTS = ("ema", "live")  # of the checkpoint of a run


def weights_problems(weights: str) -> Iterator[str]:
    """Problems with `task.weights`: one of WEIGHTS, or a file with all weights of the run."""
    if weights not in WEIGHTS and not weights.endswith(".safetensors"):
        yield f"weights={weights!r}: want one of {[*WEIGHTS]}, or a .safetensors file of task=ema"


def weights_file(weights: str) -> dict[str, str | None]:
    """`PluginConfig.files` of `task.weights`."""
    return {} if weights in WEIGHTS else {"weights": weights}


@dataclass
class TaskConfig(PluginConfig):
    """What a run does."""

    needs_torch: ClassVar[bool] = True  # False: runs without a wired system
    checks: ClassVar[tuple[str, ...]] = ("task",)  # groups that a task without torch uses
    # Options that the task selects in groups that the command does not name: "stage=[...]".
    default_options: ClassVar[tuple[str, ...]] = ()
    trains_first_stage: ClassVar[bool] = False  # True: trains only the first stage
    # Folder of an earlier run to use, with its configuration.
    run: str | None = None

    def uses_run(self) -> bool:
        """Whether this task uses an earlier run (`run`, or the newest finished one)."""
        return False

    def accepts_init_from(self) -> bool:
        """Whether `init_from` and the configuration of the command can replace an earlier run."""
        return False

    def reads_data(self) -> bool:
        """Whether the files of `data` and of the first stage must exist before it starts."""
        return not self.uses_run()

    def micro_batch(self, data: DataConfig, first_stage: FirstStageConfig) -> int:
        """Clips per process and micro-batch."""
        return data.batch_size

    def defaults(self, first_stage: FirstStageConfig) -> dict[str, float]:
        """Values for `lr` and `steps` where they are null."""
        return {"lr": 4e-3, "steps": 1200}
