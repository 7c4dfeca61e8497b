"""Which implementation runs an operation. Standard library only.

A new implementation is one line of OPS and a module with a function of the operation's name and
arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

OPS: dict[str, dict[str, str]] = {  # operation -> implementation -> module
    "group_norm": {
        "eager": "kernels.group_norm.eager",
        "reference": "kernels.group_norm.reference",
    },
    "temporal_attention": {
        "eager": "kernels.temporal_attention.eager",
        "reference": "kernels.temporal_attention.reference",
    },
}


@dataclass(frozen=True)
class Settings:
    choice: dict[str, str] = field(default_factory=lambda: dict.fromkeys(OPS, "auto"))
    strict: bool = False


# One for the process, not one for each thread or context: activation checkpointing repeats a
# forward pass in a thread of autograd's and must get the same implementation there.
_settings = Settings()
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
_said: set[str] = set()


def implementations(op: str) -> list[str]:
    """Names that `use` takes for `op`, "auto" included."""
    return ["auto", *OPS[op]]


class use:
    """Sets the implementation of every operation, or of those that are named.

    In a `with` it holds until the block ends; a backward pass that repeats the forward one
    (activation checkpointing) belongs inside.
    `auto` takes the fastest one that is there and says once where that is the plain one; with
    `strict` it raises there instead. Operations and `strict` that are not named keep their setting.
    Raises ValueError for unknown operations and for implementations that are not there.
    """

    def __init__(self, every: str | None = None, *, strict: bool | None = None, **ops: str) -> None:
        global _settings
        for op in ops:
            if op not in OPS:
                raise ValueError(f"kernels.{op}: no such operation; want one of {list(OPS)}")
        choice = dict.fromkeys(OPS, every) if every is not None else dict(_settings.choice)
        new = Settings(choice | ops, _settings.strict if strict is None else strict)
        for op, name in new.choice.items():
            _resolve(op, name, new.strict)
        self.previous, _settings = _settings, new

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _settings
        _settings = self.previous


def chosen() -> dict[str, str]:
    """Operation -> the implementation that runs it now, "auto" resolved."""
    return {op: _resolve(op, name, _settings.strict) for op, name in _settings.choice.items()}


def implementation(op: str, impl: str | None) -> Callable[..., Any]:
    """The function that runs `op`: `impl` where a call names one, else what `use` set."""
    name = impl or _settings.choice[op]
    if (op, name) not in _functions:
        module = OPS[op][_resolve(op, name, _settings.strict)]
        _functions[op, name] = getattr(import_module(module), op)
    return _functions[op, name]


def _resolve(op: str, name: str, strict: bool) -> str:
    """An implementation that is there, for a name that may be "auto"."""
    there = OPS[op]
    if name in there:
        return name
    if name == "triton":
        raise ValueError(
            f"kernels.{op}=triton: there is no Triton implementation of {op}; "
            "use kernels=auto or kernels=eager"
        )
    if name != "auto":
        raise ValueError(f"kernels.{op}={name!r}: want one of {implementations(op)}")
    if "triton" in there:
        return "triton"
    reason = f"kernels.{op}=auto runs eager: there is no Triton implementation of {op}"
    if strict:
        raise ValueError(f"{reason}, and kernels.strict forbids that; use kernels=eager")
    if reason not in _said:
        _said.add(reason)
        log.info(reason)
    return "eager"
