"""Folders of the checkout, relative to the package `sandbox`."""

from importlib.resources import files
from pathlib import Path

CHECKOUT = Path(str(files("sandbox"))).resolve().parent
CONF = CHECKOUT / "conf"
PLUGINS = CHECKOUT / "plugins"
