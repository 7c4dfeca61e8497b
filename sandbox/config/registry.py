"""The plugin registry: one file and one decorator per plugin, and a `Config` read without import.

`discover` parses plugin files (ast), takes the nested `Config` class and the module-level names
that it uses, and stores it in Hydra's ConfigStore. A plugin is imported when it is created, so a
broken plugin affects only itself. On import, `register` replaces the module's Config by the class
that was read, so that each Config is one class.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sandbox.config.conformance import check_plugin
from sandbox.config.moved_names import OLD_METHODS
from sandbox.config.reading_cache import ReadingCache
from sandbox.config.static_reader import LaterReading, Reading, first_line, line_in
from sandbox.contracts import ConfigError, PluginConfig, PluginError

ENTRY_POINTS = "sandbox.plugins"
NOT_GROUPS = ("conf", "tests")  # subfolders of a plugin folder that hold no plugins
SEVERAL = ("callbacks", "stage")  # groups that accept several options
MAX_FILES = 20_000  # below a plugin folder
MAX_NAMES = 12  # in a message; --help has the full list

T = TypeVar("T", bound=type)

log = logging.getLogger(__name__)


@dataclass
class Plugin:
    """One registered plugin: its source, and its Config or the reason why it cannot be read."""

    group: str  # "vae", "conditioning/text"
    name: str
    module: str  # import name
    path: Path | None  # None: registered by running code, such as a notebook cell
    reading: Reading | LaterReading = field(default_factory=Reading)
    stamp: tuple[int, int] | None = None  # (mtime, size) of the file that was read

    @property
    def doc(self) -> str:
        return self.reading.doc

    @property
    def config(self) -> type[PluginConfig] | None:
        return self.reading.config

    @property
    def helpers(self) -> tuple[type, ...]:
        return self.reading.helpers

    @property
    def error(self) -> str | None:
        return self.reading.error

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def place(self) -> str:
        return str(self.path) if self.path else f"module {self.module}"


_plugins: dict[str, Plugin] = {}
_classes: dict[str, type] = {}


# --- the decorator --------------------------------------------------------------------------------


def register(group: str, name: str) -> Callable[[T], T]:
    """Registers a class as `group=name`. Raises PluginError if another file has that name."""

    def add(cls: T) -> T:
        key, module = f"{group}/{name}", sys.modules.get(cls.__module__)
        _refuse_old_methods(key, cls)
        source = getattr(module, "__file__", None)
        path = Path(source).resolve() if source else None
        known = _plugins.get(key)
        if known and known.path and path != known.path:
            raise PluginError(_duplicate(key, known.place, str(path or f"module {cls.__module__}")))
        if known and known.stamp and known.config:
            for helper in known.helpers:
                setattr(module, helper.__name__, helper)
            cls.Config = known.config  # type: ignore[attr-defined]
        else:
            if not is_dataclass(getattr(cls, "Config", None)):
                raise PluginError(f"{key}: {cls.__name__} needs a nested dataclass named Config")
            reading = Reading(first_line(cls.__doc__), cls.Config)  # type: ignore[attr-defined]
            _add(Plugin(group, name, cls.__module__, path, reading))
        check_plugin(cls, group, name, _plugins[key].place)
        _classes[key] = cls
        return cls

    return add


def _refuse_old_methods(key: str, cls: type) -> None:
    """Raises PluginError for methods with names of version 0.1, which are no longer called."""
    renamed = OLD_METHODS.get(key.partition("/")[0], {}) | OLD_METHODS[""]
    own = {*vars(cls), *vars(getattr(cls, "Config", object))}
    found = [f"{old} is now called {new}" for old, new in renamed.items() if old in own]
    if found:
        raise PluginError(f"{key}: {'; '.join(found)}; rename it in {cls.__module__}")


# --- discovery ------------------------------------------------------------------------------------


def discover(folder: Path, package: str | None, group: str = "") -> None:
    """Reads new and changed plugin files below `folder` without importing them.

    `package` is the import name of the folder, None for a folder outside the import path. `group`
    is the parent of the subfolders' groups. Skips `conf`, `tests` and names that start with "_" or
    "." (helpers). Raises PluginError if another file has the same plugin name.
    """
    prefix, cache = package or _package_of(folder), ReadingCache(folder)
    for path in sorted(_python_files(folder)):
        parts = list(path.relative_to(folder).with_suffix("").parts)
        is_plugin = (group or len(parts) > 1) and parts[0] not in NOT_GROUPS
        if not is_plugin or any(p[0] in "_." for p in parts):
            continue
        full_group = "/".join((*([group] if group else []), *parts[:-1]))
        known, path = _plugins.get(f"{full_group}/{parts[-1]}"), Path(os.path.realpath(path))
        if known and known.path != path:
            raise PluginError(_duplicate(known.key, known.place, str(path)))
        stamp = (0, 0)
        with suppress(OSError):  # a symbolic link to itself
            stamp = (path.stat().st_mtime_ns, path.stat().st_size)
        if known is None or known.stamp not in (None, stamp):
            module = ".".join((prefix, *parts))
            reading = cache.read(path, module, full_group, parts[-1])
            plugin = Plugin(full_group, parts[-1], module, path, reading, stamp)
            _forget(plugin)
            _add(plugin)
    cache.write()


def _python_files(folder: Path) -> Iterator[Path]:
    """All *.py below a folder. Raises ConfigError for a folder that holds far more than plugins."""
    count = 0
    for place, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        if count > MAX_FILES:
            raise ConfigError(
                f"{folder}: more than {MAX_FILES} files and folders; want a folder of "
                "GROUP/NAME.py files only"
            )
        folders[:] = [f for f in folders if f[0] not in "_."]
        yield from (Path(place, f) for f in files if f.endswith(".py"))


def _package_of(folder: Path) -> str:
    """Creates a package for a folder outside the import path, and returns its import name."""
    name = "plugin_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(folder)]
    return name


def _forget(plugin: Plugin) -> None:
    """Removes the class and module imported from an earlier version of the file."""
    if _classes.pop(plugin.key, None):
        sys.modules.pop(plugin.module, None)


def discover_entry_points() -> None:
    """Reads the plugin folders in the entry-point group `sandbox.plugins`.

    Warns about and skips an entry point whose folder does not exist.
    """
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        top, *rest = point.value.split(".")
        spec = importlib.util.find_spec(top)  # of a top-level package: imports nothing
        homes = (spec and spec.submodule_search_locations) or ()
        folder = next((Path(home, *rest) for home in homes), None)
        if folder and folder.is_dir():
            discover(folder, point.value)
        else:
            log.warning(
                "entry point %s=%s of %s: no such folder; reinstall or remove its distribution",
                point.name, point.value, ENTRY_POINTS,
            )  # fmt: skip


def _add(plugin: Plugin) -> None:
    from sandbox.config import config_store

    _plugins[plugin.key], own = plugin, (plugin.group, plugin.name)
    if plugin.error is None:
        package = f"{plugin.group}.{plugin.name}" if plugin.group in SEVERAL else None
        config_store.put(*own, partial(default, *own), package, plugin.place)
    else:
        config_store.remove(*own)


def _duplicate(key: str, first: str, second: str) -> str:
    return f"plugin {key} exists twice: in {first} and in {second}; rename or remove one"


# --- looking up -----------------------------------------------------------------------------------


def plugins(group: str | None = None) -> list[Plugin]:
    """All plugins, or those of a group, sorted by name."""
    return [p for _, p in sorted(_plugins.items()) if group in (None, p.group)]


def source(plugin: Plugin) -> bytes:
    """The code of its file or notebook cells; empty for code typed at a prompt.

    Raises OSError if the file does not exist.
    """
    if plugin.path is not None:
        return plugin.path.read_bytes()
    cells: dict[str, None] = {}  # `inspect` finds only functions in cells
    for method in filter(inspect.isfunction, vars(_classes[plugin.key]).values()):
        with suppress(OSError):  # typed at a prompt
            cells["".join(inspect.findsource(inspect.unwrap(method))[0])] = None
    return "".join(cells).encode()


def plugin_sources(*folders: Path) -> Iterator[bytes]:
    """The code of all plugins except those in files below `folders`."""
    for plugin in plugins():
        if plugin.path is None or not any(map(plugin.path.is_relative_to, folders)):
            with suppress(OSError):  # a deleted file
                yield source(plugin)


def classes() -> dict[str, type]:
    """The classes that have been imported, by "group/name"."""
    return dict(_classes)


def groups() -> list[str]:
    return sorted({p.group for p in _plugins.values()})


def find(key: str) -> Plugin:
    """The plugin `group/name`.

    Raises PluginError with the nearest name, or with the reason why it cannot be read.
    """
    plugin = _plugins.get(key)
    if plugin is None:
        group, _, name = key.rpartition("/")
        names = [p.name for p in plugins(group)]
        raise PluginError(
            f"{group}={name}: no such plugin{nearest(name, names)}" if names
            else f"{key}: no such plugin{nearest(key, list(_plugins))}"
        )  # fmt: skip
    if plugin.config is None:
        raise PluginError(f"{plugin.group}={plugin.name} is broken: {plugin.error}")
    return plugin


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest of `words`, or a list of them."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, 1, 0.65)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(words) - MAX_NAMES} more (--help)" if len(words) > MAX_NAMES else ""
    # Shortest first: names of presets are longer than those of their plugins.
    shown = sorted(sorted(words, key=len)[:MAX_NAMES])
    return f"; there is {', '.join(shown) or 'none'}{more}"


def plugin_class(key: str) -> type:
    """Imports the class of the plugin `group/name`. Raises PluginError with the import error."""
    if key not in _classes:
        plugin = find(key)
        try:
            importlib.import_module(plugin.module)
        except PluginError:
            raise
        except (Exception, SystemExit) as e:  # the plugin's own code may raise anything
            raise PluginError(
                f"{plugin.group}={plugin.name} cannot be imported: {_where(e, plugin)}: "
                f"{type(e).__name__}: {e}"
            ) from e
    return _classes[key]


def _where(error: BaseException, plugin: Plugin) -> str:
    """file:line of the plugin at which its import failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    line = line_in(plugin.path, error)
    return f"{plugin.place}:{line}" if line else plugin.place


def create(cfg: PluginConfig) -> Any:
    """Builds a plugin from its complete Config."""
    return plugin_class(cfg.plugin)(cfg)


# --- Configs from plain containers ----------------------------------------------------------------


def default(group: str, name: str) -> PluginConfig:
    """The Config of `group=name` with its defaults."""
    plugin = find(f"{group}/{name}")
    assert plugin.config  # find raises for a plugin without one
    return plugin.config(plugin=plugin.key)


def typed(node: Any) -> Any:
    """Config objects from plain containers; a dict with `plugin` becomes that plugin's Config.

    Raises PluginError for unknown plugins, ConfigError for unknown fields and wrong types.
    """
    if isinstance(node, list):
        return [typed(v) for v in node]
    if not isinstance(node, dict):
        return node
    if not node.get("plugin"):
        return {k: typed(v) for k, v in node.items()}
    plugin = find(node["plugin"])
    assert plugin.config
    names = [f.name for f in fields(plugin.config)]
    unknown = [k for k in node if k not in names and k != "defaults"]
    if unknown:
        no_such = f"{plugin.key} has no such setting"
        raise ConfigError(*(f"{plugin.group}.{k}: {no_such}{nearest(k, names)}" for k in unknown))
    config = tuples(plugin.config(**{k: typed(v) for k, v in node.items()}))
    check_types(config, f"{plugin.group}.")
    return config


def check_types(config: Any, path: str = "") -> None:
    """Raises ConfigError for a value that does not have its field's type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.structured(config)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{path}{e.full_key or ''}: {first_line(str(e))}") from e


def tuples(config: Any) -> Any:
    """Converts lists to tuples in fields annotated as tuples (OmegaConf makes lists of them)."""
    if not is_dataclass(config) or isinstance(config, type):
        return config
    changes = {}
    for f in fields(config):
        value = getattr(config, f.name)
        types = field_types(type(config))[f.name]
        if isinstance(value, list) and any(get_origin(t) is tuple for t in types):
            changes[f.name] = _tuple(value)
        elif is_dataclass(value):
            changes[f.name] = tuples(value)
        elif isinstance(value, dict):
            changes[f.name] = {k: tuples(v) for k, v in value.items()}
    return replace(config, **changes) if changes else config


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


@cache
def field_types(config: type) -> dict[str, tuple[Any, ...]]:
    """Field -> its possible types: (int, NoneType) for `int | None`."""
    return {
        k: get_args(v) if isinstance(v, UnionType) or get_origin(v) is Union else (v,)
        for k, v in get_type_hints(config).items()
    }


def type_problems(config: Any) -> Iterator[str]:
    """What OmegaConf's type check misses: tuples of a wrong length, and the string "None"."""
    for f in fields(config):
        value = getattr(config, f.name)
        for kind in field_types(type(config))[f.name]:
            entries = get_args(kind) if get_origin(kind) is tuple else (...,)
            if isinstance(value, tuple) and ... not in entries and len(value) != len(entries):
                yield f"{f.name}={list(value)}: want {len(entries)} entries"
        if value == "None":
            yield f"{f.name}='None': want null for an empty value; None is a plain string here"
