"""Sharded tensors (FSDP2, DeepSpeed stage 3), and full ones as checkpoints hold them.

FSDP2's are DTensors. A parameter of DeepSpeed's stage 3 is empty, has its flat part as `ds_tensor`,
and methods that gather and partition it. Functions that gather are collective: all ranks call them
in the same order. Each function passes an unsharded tensor through.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sandbox.contracts import StorageError
from sandbox.storage.weight_check import differences


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor") or _is_deepspeed(value)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the full tensor."""
    return tensor.ds_shape if _is_deepspeed(tensor) else tensor.shape  # type: ignore[attr-defined]


def detached(tensor: Tensor) -> Tensor:
    """Without its graph; still sharded."""
    return tensor if _is_deepspeed(tensor) else tensor.detach()


def full_tensors(value: Any) -> Any:
    """`value` with the tensors of its dicts and lists gathered; those come to the CPU."""
    if isinstance(value, dict):
        return {k: full_tensors(v) for k, v in value.items()}
    if isinstance(value, list):
        return [full_tensors(v) for v in value]
    if _is_deepspeed(value):
        value.all_gather()
        full = value.detach().cpu().clone()
        value.partition()
        return full
    return value.full_tensor().cpu() if is_sharded(value) else value


def shard_like(full: Tensor, target: Tensor) -> Tensor:
    """`full` sharded like `target`; each rank takes its part of the tensor it has."""
    if not is_sharded(target) or is_sharded(full):
        return full
    if _is_deepspeed(target):
        part = nn.Parameter(full.detach(), requires_grad=False)
        target.convert_to_zero_parameters(param_list=[part])  # type: ignore[attr-defined]
        return part
    from torch.distributed.tensor import distribute_tensor

    full = full.to(target.device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing its memory."""
    if _is_deepspeed(tensor):
        if tensor.numel():  # gathered now: its part would be stale
            tensor.partition()  # type: ignore[attr-defined]
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def load_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copies full or equally sharded tensors. Raises StorageError for other names or shapes."""
    if found := differences(target, source, shape=shape_of):
        raise StorageError(
            f"the weights do not fit this model; {found.count} names or shapes differ{found.lines}"
        )
    for name, tensor in target.items():
        local(tensor).copy_(local(shard_like(source[name], tensor)))


def _is_deepspeed(value: Any) -> bool:
    return hasattr(value, "ds_tensor")


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """() L2 norm over all gradients: none sharded, or all sharded over all ranks."""
    norm = get_total_norm([local(g) for g in gradients])
    if not any(map(is_sharded, gradients)):
        return norm
    squares = norm.square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a full state; shards its moments like their parameters.

    Raises StorageError for the state of other parameter groups.
    """
    sizes = [[len(g["params"]) for g in groups] for groups in
             (state["param_groups"], optimizer.param_groups)]  # fmt: skip
    if sizes[0] != sizes[1]:
        raise StorageError(
            f"the optimizer state has groups of {sizes[0]} parameters, the optimizer has "
            f"{sizes[1]}: `trainable`, optimizer or network differ; to load the weights alone, "
            "use init_from=FOLDER"
        )
    parameters = [p for g in optimizer.param_groups for p in g["params"]]

    moments = {
        k: {
            name: shard_like(value, parameters[k])
            if isinstance(value, Tensor) and value.shape == parameters[k].shape
            else value
            for name, value in of_parameter.items()
        }
        for k, of_parameter in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
