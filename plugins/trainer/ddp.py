"""Data parallelism with a full replica per process (torch's DDP)."""

from dataclasses import dataclass
from typing import Any

from torch import device as Device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plugins._blocks.processes import Processes
from sandbox.contracts import TrainerConfig
from sandbox.registry import register


@register("trainer", "ddp")
class DDP(Processes):
    """A full replica per process, with averaged gradients (DDP), on CPUs or GPUs."""

    @dataclass
    class Config(TrainerConfig):
        """unused: allow parameters without a gradient in some micro-batch (dropped conditioning).

        False saves a graph traversal if there are none.
        """

        processes: int = 2
        unused: bool = True

    cfg: Config

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        frozen = [name for name, m in system.named_modules() if getattr(m, "_frozen", False)]
        identical = {  # every process has loaded or created the same values
            name
            for name, _ in (*system.named_parameters(), *system.named_buffers())
            if name.startswith(tuple(f"{f}." for f in frozen))
        }
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(system, identical)

    def strategy(self, device: Device, world: int) -> Any:
        if world == 1:
            return "auto"
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(find_unused_parameters=self.cfg.unused)
