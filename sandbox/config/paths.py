"""Folders of the checkout, found from the package `sandbox` wherever this module lives."""

from importlib.resources import files
from pathlib import Path

CHECKOUT = Path(str(files("sandbox"))).resolve().parent
CONF = CHECKOUT / "conf"
PLUGINS = CHECKOUT / "plugins"
