"""Networks in addition to the student: teachers, its EMA, networks that train in turn with it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from sandbox.contracts import Terms, TrainerConfig
from sandbox.distributed.rank import Rank
from sandbox.model.ema import EMA
from sandbox.model.offload import freeze
from sandbox.model.sharding import total_norm

DISCRIMINATOR = "discriminator"  # of a first stage


class Network(nn.Module):
    """A backbone with the conditioning whose conditions it takes."""

    def __init__(self, backbone: Any, conditioner: Any) -> None:
        super().__init__()
        self.backbone, self.conditioner = backbone, conditioner
        self.frozen = _frozen_in(self)  # such as text encoders

    def freeze(self) -> "Network":
        freeze(self.backbone)
        freeze(self.conditioner)
        return self

    def copy(self) -> "Network":
        """Another network with the same weights, without gradients until `NetworkUpdate` trains it.

        Parts that no run trains are shared.
        """
        shared: dict[int, Any] = {id(m): m for m in self.frozen}
        new = deepcopy(self, shared).requires_grad_(False)
        for part in (new.backbone, new.conditioner):
            part._frozen = part in self.frozen
        return new


def _frozen_in(part: nn.Module) -> list[nn.Module]:
    return [m for m in part.modules() if getattr(m, "_frozen", False)]


class AverageNetwork:
    """The student with its EMA weights, called without gradients. It has no weights of its own."""

    def __init__(self, student: Any, ema: EMA) -> None:
        self.backbone = _Averaged(student.backbone, "backbone.", ema)
        self.conditioner = _Averaged(student.conditioner, "conditioner.", ema)


class _Averaged:
    """A module that is called with the averages of its weights."""

    def __init__(self, module: nn.Module, prefix: str, ema: EMA) -> None:
        self.module, self.prefix, self.ema = module, prefix, ema

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        average = {
            name.removeprefix(self.prefix): value.to(self.ema.live[name].dtype)
            for name, value in self.ema.average.items()
            if name.startswith(self.prefix)
        }
        return torch.func.functional_call(self.module, average, args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class NetworkUpdate:
    """A network that trains in turn with the student: it and its optimizer, both in checkpoints.

    Its parameters require gradients only during their own update, so that the optimizer, EMA and
    clipping of the student skip them. lr: factor of the student's learning rate. clips: whether
    trainer.clip holds for its gradient.
    """

    def __init__(self, module: nn.Module, lr: float = 1.0, clips: bool = True) -> None:
        self.module, self.lr, self.clips = module, lr, clips

    def build(self, plugin: Any, lr: float, trainer: TrainerConfig, rank: Rank) -> None:
        """Builds its optimizer, of the same plugin as the student's, which has the rate `lr`.

        Gradients are averaged over the ranks of `rank`.
        """
        self.rank, self.clip = rank, trainer.clip if self.clips else None
        self.skips_bad = trainer.bad_step == "skip"
        frozen = {id(p) for m in _frozen_in(self.module) for p in m.parameters()}
        self.trained = [p for p in self.module.parameters() if id(p) not in frozen]
        self._train(True)
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        self.optimizer = plugin.build(named, lr * self.lr)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._train(False)

    def step(
        self, loss: Callable[[], Terms], share: float, rate: float, is_update: bool
    ) -> tuple[Terms, bool]:
        """Accumulates `share` of the gradient; updates the weights if `is_update`.

        Returns the loss, and whether the update was skipped: with trainer.bad_step=skip, where the
        gradient is not finite.
        """
        self._train(True)
        terms = loss()
        (terms.total * share).backward()
        self._train(False)
        return terms, is_update and not self._update(rate)

    def _update(self, rate: float) -> bool:
        """Updates the weights; False if that was skipped. All ranks agree."""
        parameters = [p for p in self.trained if p.grad is not None]
        for parameter in parameters:
            parameter.grad = self.rank.mean(parameter.grad)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = total_norm(gradients) if self.clip or self.skips_bad else None
        is_good = norm is None or not self.skips_bad or bool(norm.isfinite())
        if is_good:
            if self.clip and norm is not None:
                clip_grads_with_norm_(parameters, self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return is_good

    def _train(self, mode: bool) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(mode)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"weights": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
