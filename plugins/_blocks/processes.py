"""What the trainer plugins share: how processes make one optimizer step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch import device as Device
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sandbox.contracts import TrainerConfig
from sandbox.model.sharding import full_tensors, total_norm


class Processes:
    """One process, or several that each hold the whole system; `world` counts them."""

    def __init__(self, cfg: TrainerConfig) -> None:
        self.cfg = cfg

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        """Once, on the CPU, before optimizer and average are made of the system's parameters."""

    def strategy(self, device: Device, world: int) -> Any:
        """What Lightning's Trainer takes as its strategy."""
        return "auto"

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        """Before each micro-batch; `is_last`: the optimizer steps after it."""

    def clip(self, parameters: Sequence[nn.Parameter], most: float | None) -> None:
        """Before an optimizer step: gradients of a larger norm than `most` are scaled to it."""
        self._norm = total_norm([p.grad for p in parameters if p.grad is not None])
        if most is not None:
            clip_grads_with_norm_(parameters, most, self._norm)

    def norm(self) -> Tensor:
        """() gradient norm of all processes together before it was clipped, once a step is done."""
        return self._norm

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Its state_dict with whole tensors; all processes call this."""
        return full_tensors(optimizer.state_dict())
