"""Exponential moving average of the trainable parameters (Polyak & Juditsky 1992)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from sandbox.model.sharding import (
    detached,
    full_tensors,
    is_sharded,
    load_tensors,
    local,
    shard_like,
)


class EMA:
    """average += (1 - decay(n)) * (parameter - average), where n = 1, 2, ... counts the updates.

    `decay` is the rule of an `ema` plugin. The count is part of the state, so a resumed run has the
    same decay. Averages of half-precision parameters are float32: bfloat16 loses a step of 1e-4.
    """

    def __init__(self, module: nn.Module, decay: Callable[[int], float]) -> None:
        """Starts from the current trainable parameters of `module`, on their devices."""
        self.decay, self.updates = decay, 0
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: _as_float32(p).clone() for name, p in self.live.items()}
        self._is_applied = False

    @classmethod
    def of(cls, module: nn.Module, rule: Any) -> Self | None:
        """The EMA of an `ema` plugin; None where it has none."""
        return cls(module, rule.decay) if rule.decay is not None else None

    def shard(self) -> None:
        """Shards the averages like the parameters; all ranks call this."""
        self.average = {name: shard_like(a, self.live[name]) for name, a in self.average.items()}

    @torch.no_grad()
    def update(self, live: Mapping[str, Tensor] | None = None) -> None:
        """Updates the averages; `live` has values to use in place of parameters, by name.

        Raises RuntimeError inside `applied`.
        """
        if self._is_applied:
            raise RuntimeError(
                "the EMA weights are in the model: leave `with ema.applied(...)` before an update"
            )
        self.updates += 1
        average = [local(a) for a in self.average.values()]
        values = {**self.live, **(live or {})}
        live_values = [_as_float32(local(values[name])) for name in self.average]
        rate = 1 - self.decay(self.updates)
        torch._foreach_lerp_(average, live_values, rate)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The trainable parameters are the averages inside the block."""
        self._is_applied = True
        try:
            with replaced(self.live, self.average):
                yield
        finally:
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """Plain containers; gathers sharded averages, so all ranks call this."""
        return {
            "updates": self.updates,
            "average": {
                name: full_tensors(a) if is_sharded(a) else a.clone()
                for name, a in self.average.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict`. Raises StorageError for other names or shapes."""
        load_tensors(self.average, state["average"])
        self.updates = int(state["updates"])


@contextmanager
def replaced(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters `live` have `values` inside the block, and their own bits after it."""
    saved = [local(detached(p)).clone() for p in live.values()]
    load_tensors(live, values)
    try:
        yield
    finally:
        for p, part in zip(live.values(), saved, strict=True):
            local(detached(p)).copy_(part)


def _as_float32(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
