"""Settings of methods whose network predicts the average velocity of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sandbox.contracts import LossConfig, MethodConfig, ScheduleConfig

STEP = "step_size"  # t - r, the length of the step from t to r


@dataclass
class AverageVelocityConfig(MethodConfig):
    def scalars(self) -> Mapping[str, float]:
        """With step_size=0, the network predicts the velocity, as samplers of a flow need it."""
        return {STEP: 0.0}

    def accepts(self, schedule: ScheduleConfig, loss: LossConfig) -> Iterator[str]:
        name = self.plugin.rpartition("/")[2]
        if schedule.kind != "continuous" or schedule.predicts() != "velocity":
            plugin = schedule.plugin.rpartition("/")[2]
            yield f"{name}: learns velocities of a flow, and schedule={plugin}: use schedule=flow"
        if loss.plugin != "loss/mse":
            plugin = loss.plugin.rpartition("/")[2]
            yield f"{name}: has a squared error of its own, and loss={plugin}: use loss=mse"
