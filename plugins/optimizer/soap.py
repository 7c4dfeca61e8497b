"""SOAP: Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, 2409.11321)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugins._blocks.optimizers import PerParameter, keep_settings
from sandbox.contracts import OptimizerConfig, above, in_range
from sandbox.registry import register


class SOAP(PerParameter):
    """Algorithm 3, with one basis for each axis of a tensor; vectors get Adam.

    State of a parameter: `exp_avg` in the original and `exp_avg_sq` in the rotated coordinates,
    both shaped as the parameter; for each rotated axis i of size n, `gram_i` and its eigenvectors
    `basis_i`, (n, n) with a column for each eigenvector.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **settings: Any) -> None:
        """settings: lr, betas, eps, weight_decay, every (steps between bases), max_dim."""
        super().__init__(groups, settings)

    def update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        axes = rotated_axes(grad, group["max_dim"])
        if not state:
            # As published: the first gradient only sets the basis, so that no gradient is rotated
            # into a basis that was computed from it alone. The cleaner way would take the step.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(grad) for _ in range(2))
            for i in axes:
                state[f"gram_{i}"] = gram(grad, i) * (1 - beta2)
                state[f"basis_{i}"] = eigenvectors(state[f"gram_{i}"])
            return
        state["step"] += 1
        step, bases = int(state["step"]), {i: state[f"basis_{i}"] for i in axes}
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(rotated(grad, bases).square(), 1 - beta2)
        direction = rotated(mean, bases) / (square.sqrt() + group["eps"])
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        back = {i: basis.mT for i, basis in bases.items()}
        parameter.add_(rotated(direction, back), alpha=-group["lr"] * correction)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for i in axes:
            state[f"gram_{i}"].lerp_(gram(grad, i), 1 - beta2)
            if step % group["every"] == 0:
                self._turn(state, i)

    def _turn(self, state: dict[str, Tensor], axis: int) -> None:
        """One step of power iteration on the basis of an axis (algorithm 4).

        Columns and second moments are sorted by estimated eigenvalue, the largest first.
        """
        basis = state[f"basis_{axis}"]
        product = state[f"gram_{axis}"] @ basis
        order = (basis * product).sum(0).argsort(descending=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
        q, _ = torch.linalg.qr(_wide(product[:, order]))
        state[f"basis_{axis}"] = q.to(basis.dtype)


def rotated_axes(x: Tensor, max_dim: int) -> list[int]:
    """Axes that get a basis: of matrices and larger tensors, with 2 to `max_dim` entries."""
    return [i for i, n in enumerate(x.shape) if 1 < n <= max_dim] if x.ndim > 1 else []


def rotated(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """x with each axis of `bases` in the coordinates of its columns; same shape."""
    for axis, basis in bases.items():
        x = (x.movedim(axis, -1) @ basis).movedim(-1, axis)
    return x


def gram(x: Tensor, axis: int) -> Tensor:
    """(n, n) inner products of the slices of x along `axis` of size n."""
    rows = x.movedim(axis, 0).flatten(1)
    return rows @ rows.mT


def eigenvectors(gram: Tensor) -> Tensor:
    """(n, n) columns of a symmetric matrix, the one of the largest eigenvalue first."""
    _, vectors = torch.linalg.eigh(_wide(gram))
    return vectors.flip(1).to(gram.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32, which the decompositions need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register("optimizer", "soap")
class SOAPPlugin:
    """SOAP: Adam in the eigenbasis of each axis of a weight tensor; vectors get Adam."""

    @dataclass
    class Config(OptimizerConfig):
        """betas: of both moments; the second is also that of the statistics behind the bases.

        every: optimizer steps between two updates of the bases; max_dim: longer axes keep their
        coordinates, as their basis would have max_dim^2 elements. The first step of a run changes
        no weight, as published.
        """

        elementwise = False
        shardable = False
        betas: tuple[float, float] = (0.95, 0.95)
        weight_decay: float = 0.01
        eps: float = 1e-8
        every: int = 10
        max_dim: int = 10_000

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for i, beta in enumerate(self.betas):
                if not 0 <= beta < 1:
                    yield f"betas[{i}]={beta}: want >= 0 and < 1"
            yield from in_range("weight_decay", self.weight_decay, 0, 1e300)
            yield from above("eps", self.eps, 0)
            yield from in_range("every", self.every, 1)
            yield from in_range("max_dim", self.max_dim, 1)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def build(self, named: Iterable[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        """Optimizer of the trainable parameters of `named`; `lr` is the peak learning rate."""
        cfg = self.cfg
        trained = [p for _, p in named if p.requires_grad]
        optimizer = SOAP(
            [{"params": trained}], lr=lr, betas=cfg.betas, eps=cfg.eps,
            weight_decay=cfg.weight_decay, every=cfg.every, max_dim=cfg.max_dim,
        )  # fmt: skip
        return keep_settings(optimizer)
