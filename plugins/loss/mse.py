"""Mean squared error of the schedule's target, weighted by the schedule."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sandbox.contracts import LossConfig, Schedule, ScheduleConfig, Terms
from sandbox.registry import register


@register("loss", "mse")
class MSE:
    """Mean squared error per sample times the schedule's weight(t), averaged; in float32."""

    @dataclass
    class Config(LossConfig):
        def takes_frame_times(self) -> bool:
            return True

        def accepts(self, schedule: ScheduleConfig) -> Iterator[str]:
            if schedule.outputs() == 2:
                yield (
                    "mse: does not train a variance; want schedule.learned_variance=false, "
                    "or a loss with a variance bound"
                )

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(
        self, schedule: Schedule, out: Tensor, z0: Tensor, eps: Tensor, t: Tensor
    ) -> Terms:
        error = (out.float() - schedule.target(z0.float(), eps.float(), t)).square()
        if t.ndim == 2:  # one time, and one weight, for each frame
            per_sample = (schedule.weight(t) * error.mean((1, 3, 4))).mean(1)
        else:
            per_sample = schedule.weight(t) * error.flatten(1).mean(1)
        total = per_sample.mean()
        return Terms(total, per_sample, {"loss": total.detach()})
