"""What the trainer plugins share: how processes make one optimizer step."""

from typing import Any

from torch import device as Device
from torch import nn

from sandbox.contracts import TrainerConfig


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
