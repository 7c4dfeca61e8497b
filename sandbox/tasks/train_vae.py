"""task=train_vae: trains a first stage; vae.weights=auto does the same into the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sandbox.config.registry import register
from sandbox.contracts import DataConfig, FirstStageConfig, TaskConfig, in_range
from sandbox.distributed.rank import Rank


@register("task", "train_vae")
@dataclass
class TrainVAE:
    """Trains a first stage alone; vae.weights=FILE takes its weights."""

    @dataclass
    class Config(TaskConfig):
        """batch_size: null takes the first stage's own; clips: held-out clips to measure;
        shown: clips on the sheet.
        """

        trains_first_stage: ClassVar[bool] = True
        batch_size: int | None = None
        clips: int = 192
        shown: int = 12

        def problems(self) -> Iterator[str]:
            yield from in_range("batch_size", self.batch_size, 1)
            yield from in_range("clips", self.clips, 1)
            yield from in_range("shown", self.shown, 1)

        def micro_batch(self, data: DataConfig, first_stage: FirstStageConfig) -> int:
            return self.batch_size or first_stage.recipe().batch_size

        def defaults(self, first_stage: FirstStageConfig) -> dict[str, float]:
            return {"lr": first_stage.recipe().lr, "steps": first_stage.recipe().steps}

    cfg: Config

    def __call__(
        self, wiring: Any, overrides: Sequence[str] = (), group: str | None = None
    ) -> dict[str, Any]:
        from sandbox.distributed.supervisor import launch_run

        return launch_run("sandbox.tasks.train_vae:train_vae", wiring.root, overrides, group)


def train_vae(settings: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """The work of one rank; `settings` are those of `launch_run`."""
    from sandbox.config.composition import receive_root
    from sandbox.training.first_stage import train_first_stage

    return train_first_stage(receive_root(settings["root"]), settings["group"], rank)
