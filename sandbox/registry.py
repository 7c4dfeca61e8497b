"""Public: registers, finds and builds plugins (the code is in `sandbox.config.registry`)."""

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

__all__ = ["Plugin", "create", "default", "find", "plugin_class", "plugins", "register", "typed"]
