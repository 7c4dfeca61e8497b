"""Imported once by the fork server, so that ranks start with their imports done.

Reads the plugin files and imports the plugins that the supervisor names in a variable. Errors are
ignored: the rank that needs a broken plugin raises them.
"""

import os
from contextlib import suppress

from sandbox.config import discovery, registry
from sandbox.distributed.rank_handle import WARM

with suppress(Exception):
    discovery.setup()
    for key in os.environ.get(WARM, "").split():
        with suppress(Exception):
            registry.plugin_class(key)
