"""Schedule-free AdamW (Defazio et al. 2024, 2405.15682, algorithm 1)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugins._blocks.optimizers import PerParameter, keep_settings
from sandbox.contracts import OptimizerConfig, above, in_range
from sandbox.registry import register


class ScheduleFreeAdamW(PerParameter):
    """Gradients are taken at y = (1 - beta1) z + beta1 x; x is an average of z over the steps.

    The parameters are y. State of a parameter: `z` and `exp_avg_sq`, both as the parameter; `step`;
    the largest learning rate so far, `peak`; and the sum of the weights of all steps in the
    average, `weight_sum`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        """settings: lr, betas, eps, weight_decay, lr_power and step_power (see the Config)."""
        super().__init__(groups, settings)

    def averages(self) -> list[tuple[Tensor, Tensor]]:
        """(y, x) of each parameter that has been updated: validation and samples use x."""
        return [
            (y, y.detach().lerp(self.state[y]["z"], 1 - 1 / group["betas"][0]))
            for group in self.param_groups
            for y in group["params"]
            if self.state.get(y)
        ]

    def update(self, y: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, lr, (beta1, beta2) = self.state[y], group["lr"], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["z"], state["exp_avg_sq"] = y.detach().clone(), torch.zeros_like(y)
            state["peak"] = state["weight_sum"] = 0.0
        state["step"] += 1
        step, z, square = int(state["step"]), state["z"], state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = grad / (square / (1 - beta2**step)).sqrt().add_(group["eps"])
        update.add_(y, alpha=group["weight_decay"])  # as published: decay of y, not of z
        state["peak"] = max(lr, state["peak"])
        weight = step ** group["step_power"] * state["peak"] ** group["lr_power"]
        state["weight_sum"] += weight
        share = weight / state["weight_sum"] if state["weight_sum"] else 0.0
        # x moves by `share` to the new z; written for y, so that x takes no memory.
        y.lerp_(z, share).add_(update, alpha=lr * (beta1 * (1 - share) - 1))
        z.sub_(update, alpha=lr)


@register("optimizer", "schedule_free_adamw")
class ScheduleFreeAdamWPlugin:
    """AdamW whose averaged weights replace the decay of the learning rate.

    Validation, samples and exported weights are those averages.
    """

    @dataclass
    class Config(OptimizerConfig):
        """It needs no decay of the learning rate: use lr_schedule=constant with a warm-up, and no
        EMA.

        betas: of the interpolation between the average and the latest weights (> 0), and of the
        second moment. The weight of a step in the average is (number of the step)^step_power times
        (largest learning rate so far)^lr_power.
        """

        averages = True
        betas: tuple[float, float] = (0.9, 0.999)
        weight_decay: float = 0.01
        eps: float = 1e-8
        step_power: float = 0.0
        lr_power: float = 2.0

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for i, beta in enumerate(self.betas):
                if not 0 <= beta < 1 or (i == 0 and not beta):
                    yield f"betas[{i}]={beta}: want {'>= 0' if i else '> 0'} and < 1"
            yield from in_range("weight_decay", self.weight_decay, 0, 1e300)
            yield from above("eps", self.eps, 0)
            yield from in_range("step_power", self.step_power, 0, 100)
            yield from in_range("lr_power", self.lr_power, 0, 100)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def build(self, named: Iterable[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        """Optimizer of the trainable parameters of `named`; `lr` is the peak learning rate."""
        cfg = self.cfg
        optimizer = ScheduleFreeAdamW(
            [{"params": [p for _, p in named if p.requires_grad]}], lr=lr, betas=cfg.betas,
            eps=cfg.eps, weight_decay=cfg.weight_decay, step_power=cfg.step_power,
            lr_power=cfg.lr_power,
        )  # fmt: skip
        return keep_settings(optimizer)
