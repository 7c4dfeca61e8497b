"""Imported once by the server that ranks are forked from, so that each rank finds it done.

Plugin files are read, and those are imported that `distributed.supervisor` names in a variable. An
error is left to the rank that needs the plugin, which meets it again and says it.
"""

import os
from contextlib import suppress

from sandbox.config import discovery, registry
from sandbox.distributed.supervisor import WARM

with suppress(Exception):
    discovery.setup()
    for key in os.environ.get(WARM, "").split():
        with suppress(Exception):
            registry.plugin_class(key)
