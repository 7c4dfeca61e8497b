"""What the optimizer plugins share."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def settings_stay(optimizer: Optimizer) -> Optimizer:
    """Makes `load_state_dict` bring moments and counts only; settings stay as configured.

    As torch does it, a resumed run silently keeps the old betas and peak learning rate. The current
    `lr` does come from the state, so that a learning-rate schedule goes on where it was. Sets
    `initial_lr`, which schedules scale.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    own: list[dict[str, Any]] = []

    def remember(loading: Any, state: Any) -> None:
        groups = loading.param_groups
        own[:] = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in groups]

    def put_back(loaded: Any) -> None:
        for group, settings in zip(loaded.param_groups, own, strict=True):
            group.update(settings)

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(put_back)
    return optimizer


def can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW takes these: dense floating point, on a CPU or CUDA."""
    kinds: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)  # not DTensor
    return all(
        type(p) in kinds and p.device.type in ("cpu", "cuda") and p.is_floating_point()
        for p in parameters
    )
