"""Shared code of the trainer plugins: one optimizer step on all processes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch import device as Device
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sandbox.contracts import TrainerConfig
from sandbox.model.sharding import full_tensors, total_norm


class Processes:
    """Base of trainers: one process, or `world` processes with a full replica each."""

    def __init__(self, cfg: TrainerConfig) -> None:
        self.cfg = cfg

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        """Called once, on the CPU, before optimizer and EMA are created from the parameters."""

    def strategy(self, device: Device, world: int) -> Any:
        """The `strategy` argument of Lightning's Trainer."""
        return "auto"

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        """Called before each micro-batch; `is_last`: an optimizer step follows it."""

    def clip(self, parameters: Sequence[nn.Parameter], most: float | None) -> None:
        """Called before an optimizer step: clips the total gradient norm to `most`."""
        self._norm = total_norm([p.grad for p in parameters if p.grad is not None])
        if most is not None:
            clip_grads_with_norm_(parameters, most, self._norm)

    def norm(self) -> Tensor:
        """() gradient norm over all processes before clipping, available after a step."""
        return self._norm

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict with full tensors; all processes call this."""
        return full_tensors(optimizer.state_dict())
