"""Settings of methods whose network predicts the average velocity of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sandbox.contracts import LossConfig, MethodConfig, ScheduleConfig


@dataclass
class AverageVelocityConfig(MethodConfig):
    def scalars(self) -> Mapping[str, float]:
        """t - r of a step from t to r; 0 means the velocity, which other samplers use."""
        return {"step_size": 0.0}

    def accepts(self, schedule: ScheduleConfig, loss: LossConfig) -> Iterator[str]:
        name = self.plugin.rpartition("/")[2]
        if schedule.kind != "continuous" or schedule.predicts() != "velocity":
            plugin = schedule.plugin.rpartition("/")[2]
            yield f"{name}: learns velocities of a flow, and schedule={plugin}: use schedule=flow"
        if loss.plugin != "loss/mse":
            plugin = loss.plugin.rpartition("/")[2]
            yield f"{name}: has a squared error of its own, and loss={plugin}: use loss=mse"
