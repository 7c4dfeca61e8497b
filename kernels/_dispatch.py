"""Which implementation runs an operation. Standard library only.

A new implementation is one line of OPS and a module with a function of the operation's name and
arguments. One named "triton" also has `unsupported(...)` with the same arguments: why it cannot run
them, or None.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

OPS: dict[str, dict[str, str]] = {  # operation -> implementation -> module
    "group_norm": {
        "eager": "kernels.group_norm.eager",
        "triton": "kernels.group_norm.operator",
        "reference": "kernels.group_norm.reference",
    },
    "temporal_attention": {
        "eager": "kernels.temporal_attention.eager",
        "triton": "kernels.temporal_attention.operator",
        "reference": "kernels.temporal_attention.reference",
    },
}
# "auto" runs smaller tensors in eager mode, where a launch costs more than the bytes that it saves.
# Elements of the first argument; estimates until benchmarks/gpu_kernels.py has measured them.
CROSSOVER = {"group_norm": 2_000_000, "temporal_attention": 500_000}


@dataclass(frozen=True)
class Settings:
    choice: dict[str, str] = field(default_factory=lambda: dict.fromkeys(OPS, "auto"))
    strict: bool = False


# One for the process, not one for each thread or context: activation checkpointing repeats a
# forward pass in a thread of autograd's and must get the same implementation there.
_settings = Settings()
_modules: dict[tuple[str, str], Any] = {}
_said: set[str] = set()
_ran: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[str] = Counter()


def implementations(op: str) -> list[str]:
    """Names that `use` takes for `op`, "auto" included."""
    return ["auto", *OPS[op]]


class use:
    """Sets the implementation of every operation, or of those that are named.

    In a `with` it holds until the block ends; a backward pass that repeats the forward one
    (activation checkpointing) belongs inside.
    `auto` takes Triton for what it supports and gains by, and `triton` for all that it supports;
    each says once, for each reason, that eager runs instead, or raises there with `strict`.
    Operations and `strict` that are not named keep their setting.
    Raises ValueError for unknown operations and implementations, and with `strict` for `triton`
    on a machine that cannot run it.
    """

    def __init__(self, every: str | None = None, *, strict: bool | None = None, **ops: str) -> None:
        global _settings
        for op in ops:
            if op not in OPS:
                raise ValueError(f"kernels.{op}: no such operation; want one of {list(OPS)}")
        choice = dict.fromkeys(OPS, every) if every is not None else dict(_settings.choice)
        new = Settings(choice | ops, _settings.strict if strict is None else strict)
        for op, name in new.choice.items():
            _known(op, name)
            if new.strict and name == "triton" and (reason := _absent()):
                raise ValueError(f"kernels.{op}=triton {reason}; use kernels=auto or kernels=eager")
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
    """Operation -> the implementation that is set, "auto" resolved for this machine."""
    choice = _settings.choice
    auto = "auto" in choice.values() and ("eager" if _absent() else "triton")
    return {op: auto if name == "auto" else name for op, name in choice.items()}


def calls() -> dict[str, dict[str, int]]:
    """How often each implementation ran since the start, and why eager ran instead of Triton.

    Calls in compiled graphs are not counted.
    """
    ran: dict[str, dict[str, int]] = {op: {} for op in OPS}
    for (op, name), times in _ran.items():
        ran[op][name] = times
    return {**ran, "fallbacks": dict(_fallbacks)}


def run(op: str, impl: str | None, *args: Any, **options: Any) -> Any:
    """`op` of these arguments, by `impl` where a call names one, else by what `use` set."""
    name = impl or _settings.choice[op]
    if name in ("auto", "triton"):
        name = _supported(op, name, impl is not None, args, options)
    elif (op, name) not in _modules:
        _known(op, name)
    if not _tracing():  # counts would be part of what a compiled graph depends on
        _ran[op, name] += 1
    return getattr(_modules[op, name], op)(*args, **options)


def _supported(op: str, name: str, named: bool, args: tuple, options: dict[str, Any]) -> str:
    """ "triton" where it can run this call, and for `auto` gains by it; else "eager"."""
    x = args[0]
    if name == "auto" and (x.is_meta or x.numel() < CROSSOVER[op]):
        return "eager"
    reason = _modules[op, "triton"].unsupported(*args, **options)
    if reason is None:
        return "triton"
    said = f"kernels.{op}={name}: {reason}"
    if _settings.strict or (named and name == "triton"):
        raise ValueError(f"{said}; use kernels=auto or kernels=eager")
    _note(said)
    return "eager"


def _absent() -> str | None:
    """Why this machine cannot run Triton on any tensor; None where it can."""
    if find_spec("triton") is None:
        return "needs the package triton"
    import torch

    from kernels._launch import interpreted

    return None if torch.cuda.is_available() or interpreted() else "needs a CUDA device"


def load(op: str) -> None:
    """Imports what runs `op`; done when the operation is, since no graph can trace an import."""
    for name, module in OPS[op].items():
        _modules[op, name] = import_module(module)


def _known(op: str, name: str) -> None:
    if name not in implementations(op):
        raise ValueError(f"kernels.{op}={name!r}: want one of {implementations(op)}")


def _tracing() -> bool:
    import torch

    return torch.compiler.is_compiling()


def _note(said: str) -> None:
    if _tracing():
        return
    _fallbacks[said] += 1
    if said not in _said:
        _said.add(said)
        log.info("%s: eager runs instead", said)
