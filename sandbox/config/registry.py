"""The plugin registry: one file, one decorator, a `Config` that is read without importing the
file.

`discover` parses plugin files (ast), takes the nested `Config` class and the module-level names
that it uses, and stores it in Hydra's ConfigStore. Nothing heavy is imported until `create` is
asked for a plugin; a broken plugin breaks only itself. When the plugin is imported later,
`register` puts the classes that were read in place of the module's own, so that there is one class
for each Config.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sandbox.config.moved_names import OLD_METHODS
from sandbox.config.static_reader import first_line, line_in, read
from sandbox.contracts import ConfigError, PluginConfig, PluginError

ENTRY_POINTS = "sandbox.plugins"
NOT_GROUPS = ("conf", "tests")  # what a folder of plugins may hold besides them
SEVERAL = ("callbacks", "stage")  # groups of which several options may be named
SHOWN = 12  # names in a message; of more, --help has the list

T = TypeVar("T", bound=type)

log = logging.getLogger(__name__)


@dataclass
class Plugin:
    """One registered plugin: where it is, what its Config is, or why it cannot be read."""

    group: str  # "vae", "conditioning/text"
    name: str
    module: str  # import name
    path: Path | None  # None: registered by live code, such as a notebook cell
    doc: str = ""  # first line of the class docstring
    config: type[PluginConfig] | None = None
    error: str | None = None
    helpers: tuple[type, ...] = ()  # other classes that were read with the Config
    stamp: tuple[int, int] | None = (
        None  # (time, size) of the file when it was read; None: registered by live code
    )

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
    """Files a class under `group=name`. Raises PluginError where another place has that name."""

    def file(cls: T) -> T:
        key, module = f"{group}/{name}", sys.modules.get(cls.__module__)
        _refuse_old_methods(key, cls)
        source = getattr(module, "__file__", None)
        path = Path(source).resolve() if source else None
        known = _plugins.get(key)
        if known and known.path and path != known.path:
            raise PluginError(_twice(key, known.place, str(path or f"module {cls.__module__}")))
        if known and known.stamp and known.config:
            for read in known.helpers:
                setattr(module, read.__name__, read)
            cls.Config = known.config  # type: ignore[attr-defined]
        else:
            if not is_dataclass(getattr(cls, "Config", None)):
                raise PluginError(f"{key}: {cls.__name__} needs a nested dataclass named Config")
            _add(Plugin(group, name, cls.__module__, path, first_line(cls.__doc__), cls.Config))  # type: ignore[attr-defined]
        _classes[key] = cls
        return cls

    return file


def _refuse_old_methods(key: str, cls: type) -> None:
    """Raises PluginError for methods under names of version 0.1, which nothing would call."""
    renamed = OLD_METHODS.get(key.partition("/")[0], {}) | OLD_METHODS[""]
    own = {*vars(cls), *vars(getattr(cls, "Config", object))}
    found = [f"{old} is now called {new}" for old, new in renamed.items() if old in own]
    if found:
        raise PluginError(f"{key}: {'; '.join(found)}; rename it in {cls.__module__}")


# --- discovery ------------------------------------------------------------------------------------


def discover(folder: Path, package: str | None, group: str = "") -> None:
    """Reads every plugin file below `folder` without importing it; again only where a file has
    changed.

    `package` is the import name of the folder, None for a folder outside the import path; `group`
    is put in front of the subfolder's name. Files and folders whose names start with "_" or "."
    hold helpers and are passed over, as are `conf` and `tests`. Raises PluginError where a name is
    taken by another file.
    """
    prefix = package or _package_of(folder)
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if (
            any(p[0] in "_." for p in parts)
            or parts[0] in NOT_GROUPS
            or not (group or len(parts) > 1)
        ):
            continue
        where = "/".join((*([group] if group else []), *parts[:-1]))
        known, path = _plugins.get(f"{where}/{parts[-1]}"), path.resolve()
        if known and known.path != path:
            raise PluginError(_twice(known.key, known.place, str(path)))
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if known is None or known.stamp not in (None, stamp):
            module = ".".join((prefix, *parts))
            said = read(path, module, where, parts[-1])
            plugin = Plugin(where, parts[-1], module, path, **vars(said), stamp=stamp)
            _forget(plugin)
            _add(plugin)


def _package_of(folder: Path) -> str:
    """The import name of a folder outside the import path; its files import like any module."""
    name = "plugin_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if name not in sys.modules:
        sys.modules[name] = package = ModuleType(name)
        package.__path__ = [str(folder)]
    return name


def _forget(plugin: Plugin) -> None:
    """What an earlier state of its file left behind."""
    if _classes.pop(plugin.key, None):
        sys.modules.pop(plugin.module, None)


def discover_entry_points() -> None:
    """Reads the plugin folders that installed distributions name in the entry-point group
    `sandbox.plugins`.

    A distribution whose folder is not there is passed over with a warning: nothing can have been
    chosen from it.
    """
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        top, *rest = point.value.split(".")
        spec = importlib.util.find_spec(top)  # the top package alone: nothing is imported
        folder = (
            Path(spec.submodule_search_locations[0], *rest)
            if spec and spec.submodule_search_locations
            else None
        )
        if folder and folder.is_dir():
            discover(folder, point.value)
        else:
            log.warning(
                "entry point %s=%s of %s: there is no such folder; reinstall or remove its "
                "distribution",
                point.name, point.value, ENTRY_POINTS,
            )  # fmt: skip


def _add(plugin: Plugin) -> None:
    from hydra.core.config_store import ConfigStore

    _plugins[plugin.key] = plugin
    if plugin.config is None:
        _unstore(plugin)
    else:
        node = plugin.config(plugin=plugin.key)
        package = f"{plugin.group}.{plugin.name}" if plugin.group in SEVERAL else None
        ConfigStore.instance().store(
            plugin.name, node, plugin.group, package, provider=plugin.place
        )


def _unstore(plugin: Plugin) -> None:
    """Takes away what an earlier, readable state of a file that is broken now had stored."""
    from hydra.core.config_store import ConfigStore

    node: Any = ConfigStore.instance().repo
    for part in plugin.group.split("/"):
        node = node.get(part, {})
    node.pop(f"{plugin.name}.yaml", None)


def _twice(key: str, first: str, second: str) -> str:
    return f"plugin {key} is there twice: in {first} and in {second}; rename or remove one"


# --- looking up -----------------------------------------------------------------------------------


def plugins(group: str | None = None) -> list[Plugin]:
    """Every plugin, or those of a group, by name."""
    return [p for _, p in sorted(_plugins.items()) if group in (None, p.group)]


def source(plugin: Plugin) -> bytes:
    """Its code: that of its file, or of the cells of a notebook; empty where it is in neither.

    Raises OSError where the file is gone.
    """
    if plugin.path is not None:
        return plugin.path.read_bytes()
    cells: dict[str, None] = {}  # of what stands in one `inspect` finds functions alone
    for method in filter(inspect.isfunction, vars(_classes[plugin.key]).values()):
        with suppress(OSError):  # typed at a prompt
            cells["".join(inspect.findsource(inspect.unwrap(method))[0])] = None
    return "".join(cells).encode()


def sources_beside(*folders: Path) -> Iterator[bytes]:
    """The code of plugins that are not in files below one of `folders`."""
    for plugin in plugins():
        if plugin.path is None or not any(map(plugin.path.is_relative_to, folders)):
            with suppress(OSError):  # a file that is gone
                yield source(plugin)


def groups() -> list[str]:
    return sorted({p.group for p in _plugins.values()})


def find(key: str) -> Plugin:
    """The plugin `group/name`.

    Raises PluginError with the nearest name, or with why it cannot be read.
    """
    plugin = _plugins.get(key)
    if plugin is None:
        group, _, name = key.rpartition("/")
        there = [p.name for p in plugins(group)]
        raise PluginError(
            f"{group}={name}: no such plugin{nearest(name, there)}" if there
            else f"{key}: no such plugin{nearest(key, list(_plugins))}"
        )  # fmt: skip
    if plugin.error:
        raise PluginError(f"{plugin.group}={plugin.name} is broken: {plugin.error}")
    return plugin


def nearest(word: str, words: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest one, or those that there are."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, 1, 0.65)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(words) - SHOWN} more (--help)" if len(words) > SHOWN else ""
    shown = sorted(sorted(words, key=len)[:SHOWN])  # a preset's name is longer than its plugin's
    return f"; there is {', '.join(shown) or 'none'}{more}"


def plugin_class(key: str) -> type:
    """The class of the plugin `group/name`, imported now.

    Raises PluginError with the plugin's own error.
    """
    if key not in _classes:
        plugin = find(key)
        try:
            importlib.import_module(plugin.module)
        except PluginError:
            raise
        except (
            Exception
        ) as e:  # third-party code at import: any error is that plugin's, and is said
            raise PluginError(
                f"{plugin.group}={plugin.name} cannot be imported: {_where(e, plugin)}: "
                f"{type(e).__name__}: {e}"
            ) from e
    return _classes[key]


def _where(error: BaseException, plugin: Plugin) -> str:
    """file:line of the plugin where its import failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    line = line_in(plugin.path, error)
    return f"{plugin.place}:{line}" if line else plugin.place


def create(cfg: PluginConfig) -> Any:
    """Builds the plugin of a complete Config."""
    return plugin_class(cfg.plugin)(cfg)


# --- Configs out of plain containers --------------------------------------------------------------


def default(group: str, name: str) -> PluginConfig:
    """The Config of `group=name` with its defaults."""
    plugin = find(f"{group}/{name}")
    assert plugin.config  # find raises for a plugin without one
    return plugin.config(plugin=plugin.key)


def typed(node: Any) -> Any:
    """Plain containers (a resolved YAML) -> Config objects; a dict with a `plugin` entry becomes
    that plugin's Config.

    Raises PluginError for unknown plugins, ConfigError for fields that the Config does not have.
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
        raise ConfigError(
            *(
                f"{plugin.group}.{k}: {plugin.key} has no such setting{nearest(k, names)}"
                for k in unknown
            )
        )
    made = tuples(plugin.config(**{k: typed(v) for k, v in node.items()}))
    check_types(made, f"{plugin.group}.")
    return made


def check_types(config: Any, path: str = "") -> None:
    """Raises ConfigError for a value that is not of its field's type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.structured(config)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{path}{e.full_key or ''}: {first_line(str(e))}") from e


def tuples(config: Any) -> Any:
    """A Config whose fields annotated as tuples hold tuples (OmegaConf makes lists of them)."""
    if not is_dataclass(config) or isinstance(config, type):
        return config
    changes = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, list) and any(
            get_origin(t) is tuple for t in kinds(type(config))[f.name]
        ):
            changes[f.name] = _tuple(value)
        elif is_dataclass(value):
            changes[f.name] = tuples(value)
        elif isinstance(value, dict):
            changes[f.name] = {k: tuples(v) for k, v in value.items()}
    return replace(config, **changes) if changes else config


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


@cache
def kinds(config: type) -> dict[str, tuple[Any, ...]]:
    """Field -> the types that it may have: `int | None` is (int, NoneType)."""
    hints = get_type_hints(config)
    return {
        k: get_args(v) if isinstance(v, UnionType) or get_origin(v) is Union else (v,)
        for k, v in hints.items()
    }


def misshapen(config: Any) -> Iterator[str]:
    """What OmegaConf's types let pass.

    Tuples of a wrong length, and the word None, which is only a text there.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        for kind in kinds(type(config))[f.name]:
            entries = get_args(kind) if get_origin(kind) is tuple else (...,)
            if isinstance(value, tuple) and ... not in entries and len(value) != len(entries):
                yield f"{f.name}={list(value)}: want {len(entries)} entries"
        if value == "None":
            yield f"{f.name}='None': that is only a word here; an empty value is written null"
