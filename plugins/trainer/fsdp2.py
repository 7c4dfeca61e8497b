"""Fully sharded data parallelism (torch's FSDP2, `torch.distributed.fsdp.fully_shard`).

Zhao et al. 2023 (2304.11277): parameters, gradients, EMA and optimizer state are sharded along
their first axis; the parameters of a block are gathered only while it computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import device as Device
from torch import nn

from plugins._blocks.processes import Processes
from sandbox.contracts import OptimizerConfig, TrainerConfig
from sandbox.registry import register


class Sharded(SingleDeviceStrategy):
    """Single-device training as seen by Lightning; hooks of the model communicate."""

    def model_to_device(self) -> None:
        """Nothing to do: the model is already on the device."""

    def teardown(self) -> None:
        """Does not move the model to the CPU, since optimizer and EMA share its shards."""
        self.precision_plugin.teardown()


@register("trainer", "fsdp2")
class FSDP2(Processes):
    """Weights, gradients, EMA and optimizer state sharded over processes (FSDP2)."""

    @dataclass
    class Config(TrainerConfig):
        shards = True
        processes: int = 2

        def accepts(self, optimizer: OptimizerConfig, precision: str) -> Iterator[str]:
            if not optimizer.shardable:
                yield "fsdp2: shards weights, this optimizer needs full ones; want trainer=ddp"

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
            # Also the outermost, whose parameters are read as shards between steps.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)

    def strategy(self, device: Device, world: int) -> Any:
        return "auto" if world == 1 else Sharded(device)

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in system.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(is_last, recurse=False)


def _units(system: nn.Module) -> Iterator[nn.Module]:
    """Units of gathering: blocks in module lists, inner ones first, then trained components."""
    for part in system.children():
        if not _is_trained(part):
            continue
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
        blocks = {b for found in lists for b in found if _is_called(b) and _is_trained(b)}
        yield from (m for m in reversed([*part.modules()]) if m in blocks)
        yield part


def _is_called(module: nn.Module) -> bool:
    """Whether it has a `forward`; otherwise its children are called, and it is not a unit."""
    return type(module).forward is not nn.Module.forward


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
