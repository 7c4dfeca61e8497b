"""The plugin registry: one file, one decorator, a `Config` that is read without importing the file.

`discover` parses plugin files (ast), takes the nested `Config` class and the module-level names that it uses, and
stores it in Hydra's ConfigStore. Nothing heavy is imported until `create` is asked for a plugin; a broken plugin
breaks only itself. When the plugin is imported later, `register` puts the classes that were read in place of the
module's own, so that there is one class for each Config.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_origin, get_type_hints

from sandbox.contracts import ConfigError, PluginConfig, PluginError

ENTRY_POINTS = "sandbox.plugins"
LIGHT_IMPORTS = frozenset(sys.stdlib_module_names) | {"sandbox.contracts"}

T = TypeVar("T", bound=type)


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

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def place(self) -> str:
        return str(self.path) if self.path else f"module {self.module}"


_plugins: dict[str, Plugin] = {}
_classes: dict[str, type] = {}


# --- the decorator ------------------------------------------------------------------------------------------


def register(group: str, name: str) -> Callable[[T], T]:
    """Files a class under `group=name`. Raises PluginError where another place has that name."""

    def file(cls: T) -> T:
        key, module = f"{group}/{name}", sys.modules.get(cls.__module__)
        source = getattr(module, "__file__", None)
        path = Path(source).resolve() if source else None
        known = _plugins.get(key)
        if known and known.path and path != known.path:
            raise PluginError(_twice(key, known.place, str(path or f"module {cls.__module__}")))
        if known and known.path and known.config:
            for read in known.helpers:
                setattr(module, read.__name__, read)
            cls.Config = known.config  # type: ignore[attr-defined]
        else:
            if not is_dataclass(getattr(cls, "Config", None)):
                raise PluginError(f"{key}: {cls.__name__} needs a nested dataclass named Config")
            _add(Plugin(group, name, cls.__module__, path, _first_line(cls.__doc__), cls.Config))  # type: ignore[attr-defined]
        _classes[key] = cls
        return cls

    return file


# --- discovery ----------------------------------------------------------------------------------------------


def discover(folder: Path, package: str | None, group: str = "") -> None:
    """Reads every plugin file below `folder` without importing it.

    `package` is the import name of the folder, None for a folder outside the import path; `group` is put in front of
    the subfolder's name. Files and folders whose names start with "_" or "." hold helpers and are passed over.
    Raises PluginError where a name is taken by another file.
    """
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if any(p[0] in "_." for p in parts) or not (group or len(parts) > 1):
            continue
        where = "/".join((*([group] if group else []), *parts[:-1]))
        prefix = package or "plugin_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
        module = ".".join((prefix, *parts))
        found = _read(path.resolve(), module, where, parts[-1])
        known = _plugins.get(found.key)
        if known is None:
            _add(found)
        elif known.path != found.path:
            raise PluginError(_twice(found.key, known.place, found.place))


def discover_entry_points() -> None:
    """Reads the plugin folders that installed distributions name in the entry-point group `sandbox.plugins`."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        top, *rest = point.value.split(".")
        spec = importlib.util.find_spec(top)  # the top package alone: nothing is imported
        if spec is None or not spec.submodule_search_locations:
            raise PluginError(
                f"entry point {point.name}={point.value} of {ENTRY_POINTS}: there is no such package; "
                "reinstall or remove the distribution that declares it"
            )
        discover(Path(spec.submodule_search_locations[0], *rest), point.value)


def _add(plugin: Plugin) -> None:
    from hydra.core.config_store import ConfigStore

    _plugins[plugin.key] = plugin
    if plugin.config is not None:
        node = plugin.config(plugin=plugin.key)
        package = f"callbacks.{plugin.name}" if plugin.group == "callbacks" else None
        ConfigStore.instance().store(plugin.name, node, plugin.group, package, provider=plugin.place)


def _twice(key: str, first: str, second: str) -> str:
    return f"plugin {key} is there twice: in {first} and in {second}; rename or remove one"


# --- static reading -----------------------------------------------------------------------------------------


def _read(path: Path, module: str, group: str, name: str) -> Plugin:
    plugin = Plugin(group, name, module, path)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        cls = _registered_class(tree, group, name)
        plugin.doc = _first_line(ast.get_docstring(cls)) or _first_line(ast.get_docstring(tree))
        plugin.config, plugin.helpers = _config_class(tree, cls, module, path)
    except SyntaxError as e:
        plugin.error = f"{path}:{e.lineno}: {e.msg}"
    except _Unreadable as e:
        plugin.error = f"{path}:{e.args[1]}: {e.args[0]}"
    return plugin


class _Unreadable(Exception):
    """(reason, line)"""


def _registered_class(tree: ast.Module, group: str, name: str) -> ast.ClassDef:
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("register"):
                said = tuple(a.value for a in decorator.args if isinstance(a, ast.Constant))
                if said != (group, name):
                    raise _Unreadable(
                        f"registers {said}, but its place says @register({group!r}, {name!r})", node.lineno
                    )
                return node  # type: ignore[return-value]
    raise _Unreadable(f"no class has the decorator @register({group!r}, {name!r})", 1)


def _config_class(
    tree: ast.Module, cls: ast.ClassDef, module: str, path: Path
) -> tuple[type[PluginConfig], tuple[type, ...]]:
    """Executes the Config class with the module-level statements that it needs, and nothing else."""
    config = next((n for n in cls.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if config is None:
        raise _Unreadable(f"{cls.name} needs a nested dataclass named Config", cls.lineno)
    needed = _closure(tree, config)
    body = [n for n in tree.body if n in needed] + [config]
    space: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    try:
        exec(compile(ast.Module(body, []), str(path), "exec", dont_inherit=True), space)
    except Exception as e:  # the plugin's own code: whatever it raises disables this plugin alone
        line = e.__traceback__.tb_next.tb_lineno if e.__traceback__ and e.__traceback__.tb_next else config.lineno
        raise _Unreadable(f"Config cannot be read: {type(e).__name__}: {e}", line) from e
    made = space["Config"]
    if not (isinstance(made, type) and is_dataclass(made) and issubclass(made, PluginConfig)):
        raise _Unreadable("Config must be a dataclass derived from a Config of sandbox.contracts", config.lineno)
    made.__qualname__ = f"{cls.name}.Config"
    helpers = tuple(space[n.name] for n in body if isinstance(n, ast.ClassDef) and n is not config)
    return made, helpers


def _closure(tree: ast.Module, config: ast.ClassDef) -> set[ast.stmt]:
    """Module-level statements that define the names that `config` uses, transitively."""
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        for name in _defines(node):
            defined.setdefault(name, node)
    needed: set[ast.stmt] = set()
    todo: list[ast.stmt] = [config]
    while todo:
        for name in _uses(todo.pop()):
            node = defined.get(name)
            if node is None or node in needed:
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                _check_light(node, name)
            needed.add(node)
            todo.append(node)
    return needed


def _check_light(node: ast.Import | ast.ImportFrom, name: str) -> None:
    sources = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    heavy = [s for s in sources if s not in LIGHT_IMPORTS and s.split(".")[0] not in LIGHT_IMPORTS]
    if heavy or getattr(node, "level", 0):
        raise _Unreadable(
            f"Config uses {name}, which comes from {', '.join(heavy) or 'a relative import'}; a Config may use "
            "the standard library and sandbox.contracts only",
            node.lineno,
        )


def _defines(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
        yield from ((a.asname or a.name).split(".")[0] for a in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _uses(node: ast.AST) -> set[str]:
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not hasattr(builtins, n.id)
    }


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


# --- looking up ---------------------------------------------------------------------------------------------


def plugins(group: str | None = None) -> list[Plugin]:
    """Every plugin, or those of a group, by name."""
    return [p for _, p in sorted(_plugins.items()) if group in (None, p.group)]


def groups() -> list[str]:
    return sorted({p.group for p in _plugins.values()})


def find(key: str) -> Plugin:
    """The plugin `group/name`. Raises PluginError with the nearest name, or with why it cannot be read."""
    plugin = _plugins.get(key)
    if plugin is None:
        group = key.rpartition("/")[0]
        raise PluginError(f"{key}: no such plugin{nearest(key, [p.key for p in plugins(group)] or list(_plugins))}")
    if plugin.error:
        raise PluginError(f"{plugin.group}={plugin.name} is broken: {plugin.error}")
    return plugin


def nearest(word: str, words: list[str]) -> str:
    """"; did you mean X?" or what there is."""
    close = difflib.get_close_matches(word, words, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(sorted(words)) or 'none'}"


def plugin_class(key: str) -> type:
    """The class of the plugin `group/name`, imported now. Raises PluginError with the plugin's own error."""
    if key not in _classes:
        plugin = find(key)
        try:
            _import(plugin)
        except PluginError:
            raise
        except Exception as e:  # third-party code at import: any error is that plugin's, and is said
            raise PluginError(
                f"{plugin.group}={plugin.name} cannot be imported ({plugin.place}): {type(e).__name__}: {e}"
            ) from e
    return _classes[key]


def _import(plugin: Plugin) -> ModuleType:
    if not plugin.module.startswith("plugin_"):
        return importlib.import_module(plugin.module)
    if plugin.module in sys.modules:
        return sys.modules[plugin.module]
    spec = importlib.util.spec_from_file_location(plugin.module, str(plugin.path))
    assert spec and spec.loader  # a .py file has both
    module = sys.modules[plugin.module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[plugin.module]
        raise
    return module


def create(cfg: PluginConfig) -> Any:
    """Builds the plugin of a complete Config."""
    return plugin_class(cfg.plugin)(cfg)


# --- Configs out of plain containers ------------------------------------------------------------------------


def default(group: str, name: str) -> PluginConfig:
    """The Config of `group=name` with its defaults."""
    plugin = find(f"{group}/{name}")
    assert plugin.config  # find raises for a plugin without one
    return plugin.config(plugin=plugin.key)


def typed(node: Any) -> Any:
    """Plain containers (a resolved YAML) -> Config objects; a dict with a `plugin` entry becomes that plugin's Config.

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
        raise ConfigError(*(f"{plugin.group}.{k}: {plugin.key} has no such setting{nearest(k, names)}" for k in unknown))
    return tuples(plugin.config(**{k: typed(v) for k, v in node.items()}))


def tuples(config: Any) -> Any:
    """A Config whose fields annotated as tuples hold tuples (OmegaConf makes lists of them)."""
    if not is_dataclass(config) or isinstance(config, type):
        return config
    hints = _hints(type(config))
    changes = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, list) and "tuple" in hints[f.name]:
            changes[f.name] = _tuple(value)
        elif is_dataclass(value):
            changes[f.name] = tuples(value)
        elif isinstance(value, dict):
            changes[f.name] = {k: tuples(v) for k, v in value.items()}
    return replace(config, **changes) if changes else config


@cache
def _hints(config: type) -> dict[str, str]:
    return {k: f"{get_origin(v) or ''} {v}" for k, v in get_type_hints(config).items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value
