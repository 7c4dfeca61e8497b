"""Selects the implementation of each operation. Imports only the standard library.

To add an implementation, add an entry to OPS and a module that defines a function with the
operation's name and arguments. The "triton" module also defines `unsupported(...)` with the same
arguments; it returns why Triton cannot run the call, or None. Implementations repeat this signature
without defaults, so that a forgotten argument raises.
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
# "auto" uses eager for smaller tensors, where launch overhead exceeds the saved memory traffic.
# In elements of the first argument; estimates until benchmarks/gpu_kernels.py has run on a GPU.
CROSSOVER = {"group_norm": 2_000_000, "temporal_attention": 500_000}


@dataclass(frozen=True)
class Settings:
    choice: dict[str, str] = field(default_factory=lambda: dict.fromkeys(OPS, "auto"))
    strict: bool = False


# Global rather than per thread or context: activation checkpointing repeats the forward pass in an
# autograd thread, which must use the same implementation.
_settings = Settings()
_modules: dict[tuple[str, str], Any] = {}
_logged: set[str] = set()
_call_counts: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[str] = Counter()


def implementations(op: str) -> list[str]:
    """Names that `use` accepts for `op`, including "auto"."""
    return ["auto", *OPS[op]]


class use:
    """Selects the implementation of every operation, or of the named ones.

    As a context manager, it restores the previous settings on exit. Run the backward pass inside
    the block if it repeats the forward pass (activation checkpointing).

    `auto` uses Triton for supported calls on large enough tensors; `triton` uses it for all
    supported calls. Other calls fall back to eager: each reason is logged once, or raises with
    `strict`. Operations that are not named, and an omitted `strict`, keep their setting.

    Raises ValueError for unknown operations and implementations, and for `triton` with `strict` on
    a machine without a CUDA device or Triton.
    """

    def __init__(self, every: str | None = None, *, strict: bool | None = None, **ops: str) -> None:
        global _settings
        for op in ops:
            if op not in OPS:
                raise ValueError(f"kernels.{op}: no such operation; want one of {list(OPS)}")
        choice = dict.fromkeys(OPS, every) if every is not None else dict(_settings.choice)
        new = Settings(choice | ops, _settings.strict if strict is None else strict)
        for op, name in new.choice.items():
            _check_name(op, name)
            if new.strict and name == "triton" and (reason := _missing_requirement()):
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
    """Operation -> selected implementation, with "auto" resolved for this machine."""
    choice = _settings.choice
    if "auto" not in choice.values():
        return dict(choice)
    auto = "eager" if _missing_requirement() else "triton"
    return {op: auto if name == "auto" else name for op, name in choice.items()}


def calls() -> dict[str, dict[str, int]]:
    """Calls of each implementation since import, and of each fallback reason ("fallbacks").

    Calls in compiled graphs are not counted.
    """
    counts: dict[str, dict[str, int]] = {op: {} for op in OPS}
    for (op, name), times in _call_counts.items():
        counts[op][name] = times
    return {**counts, "fallbacks": dict(_fallbacks)}


def run(op: str, impl: str | None, *args: Any, **options: Any) -> Any:
    """Runs `op` with the implementation `impl`, or with the one that `use` selected."""
    name = impl or _settings.choice[op]
    if name in ("auto", "triton"):
        name = _triton_or_eager(op, name, impl is not None, args, options)
    elif (op, name) not in _modules:
        _check_name(op, name)
    if not _tracing():  # counters would become guards of the compiled graph
        _call_counts[op, name] += 1
    return getattr(_modules[op, name], op)(*args, **options)


def _triton_or_eager(
    op: str, name: str, per_call: bool, args: tuple[Any, ...], options: dict[str, Any]
) -> str:
    """Resolves "auto" and "triton" for one call; `per_call`: the call itself named it."""
    x = args[0]
    if name == "auto" and (x.is_meta or x.numel() < CROSSOVER[op]):
        return "eager"
    reason = _modules[op, "triton"].unsupported(*args, **options)
    if reason is None:
        return "triton"
    message = f"kernels.{op}={name}: {reason}"
    if _settings.strict or (per_call and name == "triton"):
        raise ValueError(f"{message}; use kernels=auto or kernels=eager")
    _record_fallback(message)
    return "eager"


def _missing_requirement() -> str | None:
    """Why this machine cannot run Triton at all; None if it can."""
    if find_spec("triton") is None:
        return "needs the package triton"
    import torch

    from kernels._launch import interpreted

    return None if torch.cuda.is_available() or interpreted() else "needs a CUDA device"


def load(op: str) -> None:
    """Imports all implementations of `op`. Each operation calls it once, outside any graph."""
    for name, module in OPS[op].items():
        _modules[op, name] = import_module(module)


def _check_name(op: str, name: str) -> None:
    if name not in implementations(op):
        raise ValueError(f"kernels.{op}={name!r}: want one of {implementations(op)}")


def _tracing() -> bool:
    import torch

    return torch.compiler.is_compiling()


def _record_fallback(message: str) -> None:
    if _tracing():
        return
    _fallbacks[message] += 1
    if message not in _logged:
        _logged.add(message)
        log.info("%s; using eager", message)
