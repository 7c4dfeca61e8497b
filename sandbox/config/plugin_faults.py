"""Finds the plugin whose code raised an unexpected error, from its traceback.

Only an error whose innermost frame of ours is in `sandbox` is a bug of the sandbox.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.config import conformance, registry
from sandbox.config.paths import CHECKOUT, PLUGINS
from sandbox.config.static_reader import first_line
from sandbox.contracts import PluginError, PluginFault, SandboxError

SANDBOX = CHECKOUT / "sandbox"
# Their frames say nothing: they check what a plugin gives them.
TRANSPARENT = (SANDBOX / "contracts", Path(conformance.__file__))
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
SIGNATURE = re.compile(r"^(?:\S+\.)?(\w+)\.(\w+)\(\) (?:takes|missing|got) ")
LONGEST = 300  # characters of the original message


@contextmanager
def naming_plugins() -> Iterator[None]:
    """Inside the block an unexpected error of a plugin's code becomes a PluginFault."""
    try:
        yield
    except (Exception, SystemExit) as e:
        if found := plugin_fault(e):
            raise found from e
        raise


def plugin_fault(error: BaseException) -> SandboxError | None:
    """The error of a plugin behind an unexpected error; None for a bug of the sandbox."""
    if isinstance(error, SandboxError):
        return None
    if broken := _broken_interface(error):
        return broken
    frames = _frames(error)
    found: tuple[registry.Plugin | None, Path, int] | None = None
    for path, line in reversed(frames):
        if any(path.is_relative_to(p) for p in TRANSPARENT):
            continue
        if plugin := _plugin_at(path):
            found = plugin, path, line
            break
        if path.is_relative_to(SANDBOX):
            break
        if found is None and any(path.is_relative_to(f) for f in _folders()):
            found = None, path, line  # a helper of plugins: the plugin that calls it is outside
    if found is None:
        return None
    plugin, path, line = found
    group = plugin.group if plugin else ""
    name = f"{group}={plugin.name}" if plugin else "plugin"
    text = f"{type(error).__name__}: {first_line(str(error))[:LONGEST]}".removesuffix(": ")
    fix = "correct the file, or report this to its author"
    if isinstance(error, MemoryError) or "out of memory" in text:
        fix = "use a smaller data.batch_size, clip or network"
    return PluginFault(
        f"{name}: {path}:{line} raised {text}; the interface is {conformance.interface(group)}; "
        f"{fix}",
        _trace(error, path),
    )


def _broken_interface(error: BaseException) -> PluginError | None:
    """A method that a plugin lacks, or whose arguments differ from its interface."""
    if isinstance(error, AttributeError) and error.obj is not None:
        for key, cls in registry.classes().items():
            if isinstance(error.obj, cls) and _is_last_frame_outside(error, key):
                return _broken(key, f"{cls.__name__} has no {error.name!r}")
    if isinstance(error, TypeError) and (found := SIGNATURE.match(str(error))):
        # those of users first: a copy of a plugin has the same class name
        for key, cls in sorted(registry.classes().items(), key=_is_of_project):
            if cls.__name__ == found[1] and _is_last_frame_outside(error, key):
                return _broken(key, first_line(str(error)))
    return None


def _is_of_project(item: tuple[str, type]) -> bool:
    path = registry.find(item[0]).path
    return path is not None and path.is_relative_to(PLUGINS)


def _broken(key: str, what: str) -> PluginError:
    plugin = registry.find(key)
    return PluginError(
        f"{plugin.group}={plugin.name}: {what} ({plugin.place}); the interface is "
        f"{conformance.interface(plugin.group)}"
    )


def _is_last_frame_outside(error: BaseException, key: str) -> bool:
    """Whether the error was raised outside the plugin's own file, where it was used."""
    frames = _frames(error)
    return bool(frames) and frames[-1][0] != registry.find(key).path


def _frames(error: BaseException) -> list[tuple[Path, int]]:
    """(file, line) of each frame, outermost first; of the other process, if it came from one."""
    text = str(error.__cause__ or error)
    if "Traceback (most recent call last)" in text:
        return [(Path(file), int(line)) for file, line in FRAME.findall(text)]
    return [(Path(f.filename), f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]


def _plugin_at(path: Path) -> registry.Plugin | None:
    found = next((p for p in registry.plugins() if p.path == path), None)
    return None if found is None or path.is_relative_to(SANDBOX) else found


def _folders() -> set[Path]:
    """The folders of all plugins: the project's, and those of users."""
    plugins = [p for p in registry.plugins() if p.path and not p.path.is_relative_to(SANDBOX)]
    return {p.path.parents[p.group.count("/") + 1] for p in plugins if p.path}


def _trace(error: BaseException, path: Path) -> str:
    """The traceback from the first frame in `path` on."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next
    if trace is None:  # in another process
        return f"{error.__cause__ or error}\n"
    return "".join(traceback.format_exception(type(error), error, trace, chain=False))
