"""Tensors that are cut over processes, and whole ones, as checkpoints hold.

Cut are FSDP2's DTensors, and the parameters of DeepSpeed's stage 3: empty, with a flat part beside
them and methods that gather and cut.

Functions that gather are collective: all ranks call them, in the same order. A tensor that is whole
passes through each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sandbox.contracts import StorageError


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor") or _has_part(value)


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole."""
    return tensor.ds_shape if _has_part(tensor) else tensor.shape  # type: ignore[attr-defined]


def detached(tensor: Tensor) -> Tensor:
    """Without its graph, and cut as it is."""
    return tensor if _has_part(tensor) else tensor.detach()


def whole(value: Any) -> Any:
    """`value` with all tensors in its dicts and lists whole; sharded ones come to the CPU."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    if _has_part(value):
        value.all_gather()
        found = value.detach().cpu().clone()
        value.partition()
        return found
    return value.full_tensor().cpu() if is_sharded(value) else value


def like(full: Tensor, target: Tensor) -> Tensor:
    """`full` cut as `target` is; each rank takes its part of what it has."""
    if not is_sharded(target) or is_sharded(full):
        return full
    if _has_part(target):
        part = nn.Parameter(full.detach(), requires_grad=False)
        target.convert_to_zero_parameters(param_list=[part])  # type: ignore[attr-defined]
        return part
    from torch.distributed.tensor import distribute_tensor

    full = full.to(target.device)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's part; what is written into it is written into `tensor`."""
    if _has_part(tensor):
        if tensor.numel():  # else it would be stale
            tensor.partition()  # type: ignore[attr-defined]
        return tensor.ds_tensor  # type: ignore[attr-defined]
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _has_part(value: Any) -> bool:
    return hasattr(value, "ds_tensor")


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """() L2 norm of all gradients together: all whole, or all cut over all ranks."""
    norm = get_total_norm([local(g) for g in gradients])
    if not any(map(is_sharded, gradients)):
        return norm
    import torch.distributed as dist

    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a whole state; moments are cut as their parameters are.

    Raises StorageError where it is that of other parameters.
    """
    sizes = [[len(g["params"]) for g in groups] for groups in
             (state["param_groups"], optimizer.param_groups)]  # fmt: skip
    if sizes[0] != sizes[1]:
        raise StorageError(
            f"the optimizer's state is of {sizes[0]} weights a group, here are {sizes[1]}: another "
            "`trainable`, optimizer or network; start from the weights alone with init_from=FOLDER"
        )
    parameters = [p for g in optimizer.param_groups for p in g["params"]]

    def cut(key: int, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.shape == parameters[key].shape
        return like(value, parameters[key]) if fits else value

    moments = {k: {n: cut(k, v) for n, v in s.items()} for k, s in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})
