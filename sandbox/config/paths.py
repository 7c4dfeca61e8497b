"""Folders of the checkout, relative to the package `sandbox`."""

from importlib.resources import files
from pathlib import Path

CHECKOUT = Path(str(files("sandbox"))).resolve().parent
CONF = CHECKOUT / "conf"
PLUGINS = CHECKOUT / "plugins"


def relative(path: Path) -> str:
    """A path relative to the current directory, where it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
