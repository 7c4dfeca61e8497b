"""Several processes with a device each and what belongs to weights cut over them (DeepSpeed).

Rajbhandari et al. 2020 (1910.02054). Stages 1 and 2: each process holds all weights, steps its part
of them and gathers the others. Stage 3: it holds a part of the weights, and a module's are whole
only while that computes. DeepSpeed's engine goes back and steps; weights are float32 and
`precision` is autocast, as with every other trainer here, so numbers and checkpoints are theirs.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch import device as Device

from plugins._blocks.processes import Processes
from sandbox.contracts import ConfigError, OptimizerConfig, TrainerConfig, one_of
from sandbox.model.sharding import is_sharded, like, local, shape_of
from sandbox.registry import register


class Driven(SingleDeviceStrategy):
    """To Lightning each process trains on its device alone; the engine goes back and steps."""

    def __init__(self, device: Device, processes: "DeepSpeed") -> None:
        super().__init__(device)
        self.processes = processes

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self.engine = self.processes.engine_of(self.lightning_module, self.optimizers[0])
        self.optimizers = [self.engine.optimizer]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine where that cuts weights: there its hooks begin."""
        if self.processes.cfg.stage < 3:
            return super().training_step(*args, **kwargs)
        return self.engine(super().training_step, *args, **kwargs)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the micro-batches of a step."""
        self.engine.backward(closure_loss, scale_wrt_gas=False)
        return closure_loss

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **rest: Any) -> Any:
        loss = closure()
        self.precision_plugin._after_closure(model or self.lightning_module, optimizer)
        self.engine.step()
        return loss

    def teardown(self) -> None:
        """Without bringing the model to the CPU: its weights are views of the engine's."""
        self.precision_plugin.teardown()


@register("trainer", "deepspeed")
class DeepSpeed(Processes):
    """Processes that each hold the whole model and a part of gradients and optimizer state."""

    @dataclass
    class Config(TrainerConfig):
        """stage: 1 cuts optimizer state, 2 gradients, too, 3 also weights and their average;
        offload: what stage 3 or else 1 cuts is in the memory of the host, where the optimizer
        steps, also for one process; bucket: numbers that are reduced at a time. Every trained
        weight wants a gradient in every micro-batch. Of stage 3: until training starts all is
        whole in each, frozen parts (with an adapter, all but that) stay so, and weights of linear
        layers remain for the way back where blocks are not checkpointed.
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
                yield "bad_step='skip': its engine does not ask before a step; want 'raise'"
            if self.accelerator == "mps":
                yield "accelerator='mps': want 'cuda', 'cpu' or 'auto'"
            if importlib.util.find_spec("deepspeed") is None:
                yield "deepspeed: not installed; want the extra `scale` (pip install -e '.[scale]')"

        def accepts(self, optimizer: OptimizerConfig, precision: str) -> Iterator[str]:
            if not optimizer.elementwise:
                yield "deepspeed cuts weights into flat pieces, and this optimizer wants matrices"
            if precision == "fp16":
                yield "deepspeed: its engine does not know the scaler of fp16; want bf16 or fp32"

    cfg: Config
    engine: Any = None

    def prepare(self, system: nn.Module, device: Device, world: int) -> None:
        """Raises ConfigError where stage 3 cannot cut `system`."""
        if self.cfg.stage < 3:
            return
        if getattr(system, "discriminator_update", None):
            raise ConfigError(
                "trainer.stage=3: a discriminator looks at weights between the engine's turns; "
                "want trainer.stage=2 or trainer=ddp"
            )
        Cut(system)

    def strategy(self, device: Device, world: int) -> Any:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read at its first import
        _meet_alone(device)
        return Driven(device, self)

    def begin_micro_batch(self, system: nn.Module, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)

    def clip(self, parameters: Sequence[nn.Parameter], most: float | None) -> None:
        """The engine does it in its step."""

    def norm(self) -> Tensor:
        return torch.as_tensor(self.engine.get_global_grad_norm()).float()

    def engine_of(self, system: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """The engine, which steps `optimizer` on this process's part; its state goes on."""
        import deepspeed
        from deepspeed import ops

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Reductions through shared memory, for CPUs, which a compiler would make now; gloo has its
        # own.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cfg, state = self.cfg, optimizer.state_dict()["state"]
        self.groups = [[*g["params"]] for g in optimizer.param_groups]
        optimizer.state.clear()
        trained = sum(p.numel() for group in self.groups for p in group)
        offload = {"device": "cpu" if cfg.offload else "none"}
        self.engine, *_ = deepspeed.initialize(
            model=system if cfg.stage < 3 else Cut(system),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only for its counts of samples
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
                    "sub_group_size": trained,  # a flat part for each group
                    # Small ones are cut, too: a part is all that is written here.
                    "stage3_param_persistence_threshold": 0,
                    # Its own linear layer rounds before it adds the bias, and stays in the process.
                    "memory_efficient_linear": False,
                },
            },
        )
        if state:
            self._resume(optimizer, state)
        return self.engine

    def _flats(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """This process's part of each group of the optimizer."""
        if self.cfg.stage < 3:
            return [flat for group in optimizer.param_groups for flat in group["params"]]
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def _resume(self, optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
        """Cuts whole moments as the engine has cut weights: into one flat part for each group."""
        numbers = iter(range(len(state)))
        for parameters, flat in zip(self.groups, self._flats(optimizer), strict=True):
            found: dict[str, Any] = {}
            filled = 0
            for p, number in zip(parameters, numbers, strict=False):
                for name, value in state[number].items():
                    if not isinstance(value, Tensor) or value.shape != shape_of(p):
                        found[name] = value
                        continue
                    whole = found.setdefault(name, torch.zeros_like(flat))
                    if is_sharded(p):
                        part = local(like(value, p))
                        whole.narrow(0, filled, part.numel()).copy_(part)
                    elif p._hp_mapping is not None:  # of which this process has a part
                        here = p._hp_mapping.get_hp_fragment_address()
                        there = p._hp_mapping.lp_fragment_address
                        part = value.flatten().narrow(0, there.start, there.numel)
                        whole.narrow(0, here.start, here.numel).copy_(part)
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
                if (own := getattr(p, "_hp_mapping", None)) is not None:
                    # The engine does so after its first group's first step, when others have none.
                    own.set_optim_state_fragment(flat, optimizer.state[flat])
                state[number] = {
                    name: safe_get_full_optimizer_state(p, name).cpu()
                    if _is_moment(value, flat)
                    else deepcopy(value)  # a count of steps each, which torch counts in place
                    for name, value in optimizer.state[flat].items()
                }
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": numbers})
        return {"state": state, "param_groups": groups}


class Cut(nn.Module):
    """What the engine is to cut of a system, as a model that runs what it is called with."""

    def __init__(self, system: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_without_frozen(system))

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)


def _without_frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts with trained weights and without a frozen part: those need not forward."""
    if not any(p.requires_grad for p in module.parameters()):
        return
    if not any(getattr(m, "_frozen", False) for m in module.modules()):
        yield module
        return
    if any(p.requires_grad for p in module.parameters(recurse=False)):
        raise ConfigError(
            f"trainer.stage=3: {type(module).__name__} has trained weights of its own and a frozen "
            "part; want trainer.stage=2 or trainer=fsdp2"
        )
    for child in module.children():
        yield from _without_frozen(child)


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _meet_alone(device: Device) -> None:
    """The engine wants a process group, also of one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
