"""The parts of a Hydra override, such as `+backbone.width=3`."""

import re
from typing import Any


def key(override: str) -> str:
    """`backbone.width`, without a leading + or ~."""
    return override.partition("=")[0].lstrip("+~")


def value(override: str) -> str:
    return override.partition("=")[2]


def top(override: str) -> str:
    """The group or top-level setting: `backbone`."""
    return re.split(r"[=.@/]", override.lstrip("+~"))[0]


def parse(override: str) -> Any:
    """Hydra's Override. Raises HydraException for a syntax error."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)
