"""Fused operations as functions of tensors, each with several implementations.

`kernels.group_norm(...)` and `kernels.temporal_attention(...)` take the same arguments for every
implementation. `kernels.use(...)` selects the implementation, `kernels.chosen()` returns the
selection, and `kernels.calls()` counts what ran.

Importing this package imports neither torch nor triton: settings are checked without them, and
other libraries probe for a package named `kernels`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernels._dispatch import OPS, calls, chosen, implementations, use

if TYPE_CHECKING:
    from kernels.group_norm import group_norm
    from kernels.temporal_attention import temporal_attention

__all__ = ["calls", "chosen", "group_norm", "implementations", "temporal_attention", "use"]


class _Package(ModuleType):
    """Keeps `kernels.<op>` bound to the function, not to the subpackage of the same name.

    The import system sets `kernels.group_norm` to the subpackage when any module in it is
    imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in OPS:
        return getattr(import_module(f"kernels.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
