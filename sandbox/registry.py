"""Public: registers, finds and builds plugins (the code is in `sandbox.config.registry`).

`mask_text` masks secrets in what a plugin sends elsewhere.
"""

from sandbox.config.registry import (
    Plugin,
    create,
    default,
    find,
    plugin_class,
    plugins,
    register,
    typed,
)
from sandbox.config.secrets import mask_text

__all__ = [
    "Plugin",
    "create",
    "default",
    "find",
    "mask_text",
    "plugin_class",
    "plugins",
    "register",
    "typed",
]
