"""ZeRO data parallelism (DeepSpeed; Rajbhandari et al. 2020, 1910.02054).

Stages 1 and 2: each process holds all weights, updates its shard and gathers the others. Stage 3:
weights are sharded too, and those of a module are gathered only while it computes. DeepSpeed's
engine runs backward and the optimizer step. Weights are float32 and `precision` is autocast, as
with all trainers here, so results and checkpoints are compatible.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch import device as Device

from plugins._blocks.processes import Processes
from sandbox.contracts import ConfigError, OptimizerConfig, TrainerConfig, one_of
from sandbox.model.sharding import is_sharded, local, shape_of, shard_like
from sandbox.registry import register


class EngineStrategy(SingleDeviceStrategy):
    """Single-device training as seen by Lightning; the engine runs backward and the step."""

    def __init__(self, device: Device, processes: "DeepSpeed") -> None:
        super().__init__(device)
        self.processes = processes

    @property
    def system(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self.engine = self.processes.engine_of(self.system, self.optimizers[0])
        self.optimizers = [self.engine.optimizer]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs through the engine in stage 3, whose hooks gather the weights."""
        if self.processes.cfg.stage < 3:
            return super().training_step(*args, **kwargs)
        return self.engine(super().training_step, *args, **kwargs)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has already divided the loss by the number of micro-batches."""
        self.engine.backward(closure_loss, scale_wrt_gas=False)
        return closure_loss

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **rest: Any) -> Any:
        loss = closure()
        self.precision_plugin._after_closure(model or self.system, optimizer)
        self.engine.step()
        return loss

    def teardown(self) -> None:
        """Does not move the model to the CPU, since its weights are views of the engine's."""
        self.precision_plugin.teardown()


@register("trainer", "deepspeed")
class DeepSpeed(Processes):
    """Gradients and optimizer state sharded over processes, in stage 3 also weights (ZeRO)."""

    @dataclass
    class Config(TrainerConfig):
        """stage: 1 shards optimizer state, 2 also gradients, 3 also weights and EMA.

        offload: keep the shards (weights in stage 3, optimizer state) in host memory, where the
        optimizer steps, also with one process; bucket: elements per reduction. Every trained weight
        needs a gradient in every micro-batch. Stage 3: each process holds everything unsharded
        until training starts; frozen modules (with an adapter, all others) stay unsharded; and
        weights of linear layers stay gathered for backward unless blocks are checkpointed.
        """

        shards = True
        processes: int = 2
        stage: int = 2
        offload: bool = False
        bucket: int = 500_000_000

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("stage", self.stage, (1, 2, 3))
            if self.bucket < 1:
                yield f"bucket={self.bucket}: want >= 1"
            if self.bad_step == "skip":
                yield "bad_step='skip': the engine cannot skip a step; want 'raise'"
            if self.accelerator == "mps":
                yield "accelerator='mps': want 'cuda', 'cpu' or 'auto'"
            if importlib.util.find_spec("deepspeed") is None:
                yield "deepspeed: not installed; want the extra `scale` (pip install -e '.[scale]')"

        def accepts(self, optimizer: OptimizerConfig, precision: str) -> Iterator[str]:
            if not optimizer.elementwise:
                yield "deepspeed: shards weights into flat pieces, this optimizer needs matrices"
            if optimizer.averages:
                yield (
                    "deepspeed: its engine hides the averages of this optimizer; "
                    "want trainer=ddp or trainer=fsdp2"
                )
            if precision == "fp16":
                yield "deepspeed: does not support the gradient scaler of fp16; want bf16 or fp32"

    cfg: Config
    engine: Any = None

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        """Raises ConfigError if stage 3 cannot shard `system`."""
        if self.cfg.stage < 3:
            return
        if getattr(system, "updates", None):
            raise ConfigError(
                "trainer.stage=3: a discriminator reads weights between the engine's steps; "
                "want trainer.stage=2 or trainer=ddp"
            )
        Sharded(system)

    def strategy(self, device: Device, world: int) -> Any:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read at its first import
        _ensure_process_group(device)
        return EngineStrategy(device, self)

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)

    def clip(self, parameters: Sequence[nn.Parameter], most: float | None) -> None:
        """Nothing to do: the engine clips in its step."""

    def norm(self) -> Tensor:
        return torch.as_tensor(self.engine.get_global_grad_norm()).float()

    def engine_of(self, system: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """The engine, which steps `optimizer` on the shard of this process, with its state."""
        import deepspeed
        from deepspeed import ops

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Shared-memory reductions for CPUs, which would be compiled now; gloo has its own.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cfg, state = self.cfg, optimizer.state_dict()["state"]
        self.groups = [[*g["params"]] for g in optimizer.param_groups]
        optimizer.state.clear()
        trained = sum(p.numel() for group in self.groups for p in group)
        offload = {"device": "cpu" if cfg.offload else "none"}
        self.engine, *_ = deepspeed.initialize(
            model=system if cfg.stage < 3 else Sharded(system),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only for sample counts
                "gradient_accumulation_steps": cfg.accumulate,
                "gradient_clipping": cfg.clip or 0.0,
                "zero_allow_untested_optimizer": True,  # it is elementwise
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {
                    "stage": cfg.stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": min(cfg.bucket, trained),
                    "allgather_bucket_size": min(cfg.bucket, trained),
                    "offload_optimizer": offload,
                    **({} if cfg.stage < 3 else {"offload_param": offload}),
                    "sub_group_size": trained,  # one flat shard per group
                    # Shard small parameters too: `_resume` and `optimizer_state` assume it.
                    "stage3_param_persistence_threshold": 0,
                    # Its linear layer rounds before adding the bias, and stays patched in.
                    "memory_efficient_linear": False,
                },
            },
        )
        if state:
            self._resume(optimizer, state)
        return self.engine

    def _flats(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The flat shard of this process for each group of the optimizer."""
        if self.cfg.stage < 3:
            return [flat for group in optimizer.param_groups for flat in group["params"]]
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _resume(self, optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
        """Shards full moments as the engine shards weights: into one flat tensor per group."""
        numbers = iter(range(len(state)))
        for parameters, flat in zip(self.groups, self._flats(optimizer), strict=True):
            found: dict[str, Any] = {}
            filled = 0
            for p, number in zip(parameters, numbers, strict=False):
                for name, value in state[number].items():
                    if not isinstance(value, Tensor) or value.shape != shape_of(p):
                        found[name] = value
                        continue
                    shard = found.setdefault(name, torch.zeros_like(flat))
                    if is_sharded(p):
                        part = local(shard_like(value, p))
                        shard.narrow(0, filled, part.numel()).copy_(part)
                    elif p._hp_mapping is not None:  # this process holds a part of p
                        target = p._hp_mapping.get_hp_fragment_address()
                        source = p._hp_mapping.lp_fragment_address
                        part = value.flatten().narrow(0, source.start, source.numel)
                        shard.narrow(0, target.start, target.numel).copy_(part)
                filled += local(p).numel()
            optimizer.state[flat] = found

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self.engine is None:
            return super().optimizer_state(optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        flats = self._flats(optimizer)
        for parameters, group, flat in zip(self.groups, optimizer.param_groups, flats, strict=True):
            numbers = [*range(len(state), len(state) + len(parameters))]
            for p, number in zip(parameters, numbers, strict=True):
                if (mapping := getattr(p, "_hp_mapping", None)) is not None:
                    # The engine does this after the first step of its first group only.
                    mapping.set_optim_state_fragment(flat, optimizer.state[flat])
                state[number] = {
                    name: cast(Tensor, safe_get_full_optimizer_state(p, name)).cpu()
                    if _is_moment(value, flat)
                    else deepcopy(value)  # step counts, which torch updates in place
                    for name, value in optimizer.state[flat].items()
                }
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": numbers})
        return {"state": state, "param_groups": groups}


class Sharded(nn.Module):
    """The modules of a system that the engine shards; `forward` runs the given step."""

    def __init__(self, system: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_without_frozen(system))

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)


def _without_frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules with trained weights that contain no frozen module."""
    if not any(p.requires_grad for p in module.parameters()):
        return
    if not any(getattr(m, "_frozen", False) for m in module.modules()):
        yield module
        return
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        raise ConfigError(
            f"trainer.stage=3: {type(module).__name__} has trained weights and a frozen child; "
            "want trainer.stage=2 or trainer=fsdp2"
        )
    for child in module.children():
        yield from _without_frozen(child)


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _ensure_process_group(device: Device) -> None:
    """The engine needs a process group, even with one process."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
