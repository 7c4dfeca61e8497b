"""Shared code of the optimizer plugins."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class PerParameter(Optimizer, ABC):
    """An optimizer that updates one parameter after another."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have gradients; returns the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], /) -> None:
        """Changes a parameter and its `state` in place; `group` has the settings."""


def keep_settings(optimizer: Optimizer) -> Optimizer:
    """Makes `load_state_dict` restore moments, step counts and the current `lr` only.

    By default torch also restores betas, weight decay and the peak learning rate, so that a resumed
    run silently ignores new settings. Sets `initial_lr`, which learning-rate schedules scale.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    configured: list[dict[str, Any]] = []

    def save(loading: Any, state: Any) -> None:
        groups = loading.param_groups
        configured[:] = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]

    def restore(loaded: Any) -> None:
        for group, settings in zip(loaded.param_groups, configured, strict=True):
            group.update(settings)

    optimizer.register_load_state_dict_pre_hook(save)
    optimizer.register_load_state_dict_post_hook(restore)
    return optimizer


def can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW supports these: dense floating point, on a CPU or CUDA."""
    kinds: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)  # not DTensor
    return all(
        type(p) in kinds and p.device.type in ("cpu", "cuda") and p.is_floating_point()
        for p in parameters
    )
