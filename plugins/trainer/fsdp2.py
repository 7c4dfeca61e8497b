"""Several processes with a device each and a part of the model in each (torch's FSDP2).

Zhao et al. 2023 (2304.11277) in its second form, `torch.distributed.fsdp.fully_shard`: parameters,
gradients, average and optimizer state are cut along their first axis; a block is whole in a process
only while that computes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import device as Device
from torch import nn

from plugins._blocks.processes import Processes
from sandbox.contracts import TrainerConfig
from sandbox.registry import register


class Sharded(SingleDeviceStrategy):
    """To Lightning each process trains on its device alone: the model's own hooks communicate."""

    def model_to_device(self) -> None:
        """It is there."""

    def teardown(self) -> None:
        """Without bringing the model to the CPU: optimizer and average share its parts."""
        self.precision_plugin.teardown()


@register("trainer", "fsdp2")
class FSDP2(Processes):
    """Processes that each hold a part of the weights and of all that belongs to them."""

    @dataclass
    class Config(TrainerConfig):
        shards = True
        processes: int = 2

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        if world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        for module in _units(system):
            frozen = {
                p for m in module.modules() if getattr(m, "_frozen", False) for p in m.parameters()
            }
            # Also the outermost: its parameters are read as parts between steps.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)

    def strategy(self, device: Device, world: int) -> Any:
        return "auto" if world == 1 else Sharded(device)

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in system.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last, recurse=False)


def _units(system: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: blocks in lists, inner ones first, then a trained component."""
    for part in system.children():
        if not any(p.requires_grad for p in part.parameters()):
            continue
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
        blocks = {b for found in lists for b in found if _is_called(b) and _has_own(b)}
        yield from (m for m in reversed([*part.modules()]) if m in blocks)
        yield part


def _is_called(module: nn.Module) -> bool:
    """Whether it computes in its own `forward`; else its parts are called, and it is not a unit."""
    return type(module).forward is not nn.Module.forward


def _has_own(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
