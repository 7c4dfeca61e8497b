"""Hot operations as functions of tensors, each with several implementations.

`kernels.group_norm(...)` and `kernels.temporal_attention(...)` are called with the same arguments
whatever runs them; `kernels.use(...)` says what does, `kernels.chosen()` tells it and
`kernels.calls()` what ran. Importing this
package imports neither torch nor triton: other libraries probe an import name `kernels`, and
settings are checked without either.
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
    """An operation's folder has the operation's name; here that name is always the function.

    The import system sets `kernels.group_norm` to the subpackage, whoever imports a part of it
    first.
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
