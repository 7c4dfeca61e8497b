"""Exponential moving average of the trainable parameters (Polyak & Juditsky 1992)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from sandbox.contracts import StorageError
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
    `others` has further averages with rules of their own, which only snapshots contain.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: Callable[[int], float],
        others: Mapping[str, Callable[[int], float]] | None = None,
    ) -> None:
        """Starts from the current trainable parameters of `module`, on their devices."""
        self.decay, self.rules, self.updates = decay, dict(others or {}), 0
        self.live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = self._start()
        self.others = {name: self._start() for name in self.rules}
        self._is_applied = False

    def _start(self) -> dict[str, Tensor]:
        return {name: _as_float32(p).clone() for name, p in self.live.items()}

    def averages(self) -> list[dict[str, Tensor]]:
        """The average that samples use, then the others."""
        return [self.average, *self.others.values()]

    @classmethod
    def of(cls, module: nn.Module, rule: Any) -> Self | None:
        """The EMA of an `ema` plugin; None where it has none."""
        if rule.decay is None:
            return None
        return cls(module, rule.decay, getattr(rule, "others", None))

    def shard(self) -> None:
        """Shards the averages like the parameters; all ranks call this."""
        for average in self.averages():
            average |= {name: shard_like(a, self.live[name]) for name, a in average.items()}

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
        values = {**self.live, **(live or {})}
        live_values = [_as_float32(local(values[name])) for name in self.average]
        for decay, average in zip((self.decay, *self.rules.values()), self.averages(), strict=True):
            mine, rate = [local(a) for a in average.values()], 1 - decay(self.updates)
            torch._foreach_lerp_(mine, live_values, rate)  # pyright: ignore[reportPrivateImportUsage]

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
        average, *others = map(_full, self.averages())
        named = dict(zip(self.others, others, strict=True))
        return {"updates": self.updates, "average": average} | ({"others": named} if named else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict`. Raises StorageError for other averages, names or shapes."""
        saved = state.get("others", {})
        if saved.keys() != self.others.keys():
            there, here = (", ".join(names) or "none" for names in (saved, self.others))
            raise StorageError(
                f"the checkpoint has further averages {there}, this run has {here}: `ema` differs; "
                "use the settings of the run, or init_from=FOLDER to start a new run"
            )
        load_tensors(self.average, state["average"])
        for name, average in self.others.items():
            load_tensors(average, saved[name])
        self.updates = int(state["updates"])


def _full(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy; gathers sharded tensors."""
    return {n: full_tensors(a) if is_sharded(a) else a.clone() for n, a in average.items()}


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
