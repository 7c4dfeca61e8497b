"""Prints errors on the terminal."""

from __future__ import annotations

import sys

from sandbox.config.secrets import mask_text
from sandbox.contracts import ConfigError, PluginFault, SandboxError
from sandbox.distributed.remote_errors import RankError, RemoteTraceback

BUG = "this is a bug of the sandbox and not of your settings; please report it with the lines above"


def report(error: SandboxError, before: str = "") -> None:
    """Prints an error on stderr, with secrets masked."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    if len(problems) == 1:
        text = f"{before}error: {problems[0]}"
    else:
        text = "\n".join([f"{before}{len(problems)} errors:", *(f"  - {p}" for p in problems)])
    text = "\n".join([text, *getattr(error, "__notes__", [])])
    if isinstance(error, PluginFault):
        text = f"{error.traceback}{text}"
    elif type(error) is RankError and isinstance(error.__cause__, RemoteTraceback):
        text = f"{error.__cause__}{text}\n{BUG}"
    print(mask_text(text), file=sys.stderr, flush=True)
