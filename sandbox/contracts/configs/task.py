"""Config of what a run does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sandbox.contracts.configs.base import PluginConfig
from sandbox.contracts.configs.data import DataConfig
from sandbox.contracts.configs.system import FirstStageConfig


@dataclass
class TaskConfig(PluginConfig):
    """What a run does."""

    needs_torch: ClassVar[bool] = True  # False: works without a wired system
    checks: ClassVar[tuple[str, ...]] = ("task",)  # groups that such a task uses
    # Options that the task selects in groups that the command does not name: "stage=[...]".
    default_options: ClassVar[tuple[str, ...]] = ()
    trains_first_stage: ClassVar[bool] = False  # and nothing else
    # Folder of an earlier run that this task works on; its configuration is used.
    run: str | None = None

    def uses_run(self) -> bool:
        """Whether this task works on an earlier run (`run`, else the newest finished one)."""
        return False

    def accepts_init_from(self) -> bool:
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
