"""Exponential moving average of the trainable parameters (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from sandbox.contracts import StorageError
from sandbox.model.sharding import detached, is_sharded, like, local, shape_of, whole


class EMA:
    """average += (1 - decay(n)) * (parameter - average), n = 1, 2, ... counting the updates.

    `decay` is the rule of an `ema` plugin. The count is part of the state, so a resumed run cannot
    be off by one. Averages are float32 also where parameters are narrower: a step of 1e-4 is lost
    in bfloat16.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        """Starts from the trainable parameters of `module` as they are, on their devices."""
        self.decay, self.updates = decay, 0
        self.live = _trainable(module)
        self.average = {name: _wide(p).clone() for name, p in self.live.items()}
        self._is_applied = False

    @classmethod
    def of(cls, module: nn.Module, rule: Any) -> Self | None:
        """The average that an `ema` plugin asks for; None where it asks for none."""
        return cls(module, rule.decay) if rule.decay is not None else None

    def cut(self) -> None:
        """Cuts the averages as the parameters are by now; all ranks call this."""
        self.average = {name: like(a, self.live[name]) for name, a in self.average.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters in. Raises RuntimeError inside `applied`."""
        if self._is_applied:
            raise RuntimeError(
                "the average is in the model's place just now: leave `with ema.applied(...)` first"
            )
        self.updates += 1
        average = [local(a) for a in self.average.values()]
        live = [_wide(local(p)) for p in self.live.values()]
        rate = 1 - self.decay(self.updates)
        torch._foreach_lerp_(average, live, rate)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The averages are the parameters of `module` inside the block, and not afterwards."""
        live = [*_trainable(module).values()]
        kept = [local(detached(p)).clone() for p in live]
        self.copy_to(module)
        self._is_applied = True
        try:
            yield
        finally:
            self._is_applied = False
            for p, part in zip(live, kept, strict=True):
                local(detached(p)).copy_(part)

    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the parameters of `module`. StorageError where names or shapes differ."""
        _copy(self.average, _trainable(module))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers; sharded averages are gathered, so all ranks must call this."""
        return {
            "updates": self.updates,
            "average": {
                name: whole(a) if is_sharded(a) else a.clone() for name, a in self.average.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The opposite of `state_dict`. Raises StorageError where names or shapes differ."""
        _copy(state["average"], self.average)
        self.updates = int(state["updates"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _wide(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Any]) -> None:
    strange = sorted(source.keys() ^ target.keys())
    strange += [k for k in target if k in source and shape_of(source[k]) != shape_of(target[k])]
    if strange:
        raise StorageError(
            f"the average does not fit this model; {len(strange)} names or shapes differ: "
            f"{', '.join(strange[:10])}"
        )
    for name, value in target.items():
        local(value).copy_(local(like(source[name], value)))
