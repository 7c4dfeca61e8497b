"""Reads a plugin's Config without importing its file.

The file is parsed (ast); the nested `Config` class is executed with the module-level statements
that define the names it uses, transitively, and nothing else. Those may come from the standard
library, `sandbox.contracts` and `plugins._configs` (which holds to the same rule), so reading is
fast and runs nothing heavy.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from sandbox.contracts import PluginConfig

LIGHT_IMPORTS = frozenset(sys.stdlib_module_names) | {"sandbox.contracts"}
LIGHT_PACKAGE = "plugins._configs."  # what several Configs share


@dataclass
class Reading:
    """What a plugin file says: first line of its docstring, its Config, or why it has none."""

    doc: str = ""
    config: type[PluginConfig] | None = None
    helpers: tuple[type, ...] = ()  # other classes that were read with the Config
    error: str | None = None


def read(path: Path, module: str, group: str, name: str) -> Reading:
    """Reads the plugin `group/name` in a file whose import name will be `module`. Never raises."""
    found = Reading()
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        cls = _registered_class(tree, group, name)
        found.doc = first_line(ast.get_docstring(cls)) or first_line(ast.get_docstring(tree))
        found.config, found.helpers = _config_class(tree, cls, module, path)
    except SyntaxError as e:
        found.error = f"{path}:{e.lineno}: {e.msg}"
    except (OSError, ValueError) as e:  # no access, not UTF-8, a null byte
        found.error = f"{path}:1: cannot be read ({e})"
    except _Unreadable as e:
        found.error = f"{path}:{e.args[1]}: {e.args[0]}"
    return found


class _Unreadable(Exception):
    """(reason, line)"""


def _registered_class(tree: ast.Module, group: str, name: str) -> ast.ClassDef:
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("register"):
                said = tuple(a.value for a in decorator.args if isinstance(a, ast.Constant))
                if said != (group, name):
                    raise _Unreadable(
                        f"registers {said}, but its place says @register({group!r}, {name!r})",
                        node.lineno,
                    )
                return node  # type: ignore[return-value]
    raise _Unreadable(f"no class has the decorator @register({group!r}, {name!r})", 1)


def _config_class(
    tree: ast.Module, cls: ast.ClassDef, module: str, path: Path
) -> tuple[type[PluginConfig], tuple[type, ...]]:
    """Executes the Config class with the module-level statements that it needs, nothing else."""
    config = next((n for n in cls.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if config is None:
        raise _Unreadable(f"{cls.name} needs a nested dataclass named Config", cls.lineno)
    needed = _closure(tree, config)
    body = [n for n in tree.body if n in needed] + [config]
    space: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    try:
        exec(compile(ast.Module(body, []), str(path), "exec", dont_inherit=True), space)
    except Exception as e:  # the plugin's own code: whatever it raises disables this plugin alone
        line = line_in(path, e) or config.lineno
        raise _Unreadable(f"Config cannot be read: {type(e).__name__}: {e}", line) from e
    made = space["Config"]
    if not (isinstance(made, type) and is_dataclass(made) and issubclass(made, PluginConfig)):
        raise _Unreadable(
            "Config must be a dataclass derived from a Config of sandbox.contracts", config.lineno
        )
    made.__qualname__ = f"{cls.name}.Config"
    _check_defaults(made, config.lineno)
    helpers = tuple(space[n.name] for n in body if isinstance(n, ast.ClassDef) and n is not config)
    return made, helpers


def _check_defaults(config: type[PluginConfig], line: int) -> None:
    """Raises _Unreadable for a Config that Hydra cannot hold.

    A field without a default, or of a type it does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.structured(config())
    except (TypeError, NameError, ValueError, OmegaConfBaseException) as e:
        raise _Unreadable(f"Config cannot be used: {first_line(str(e))}", line) from e


def _closure(tree: ast.Module, config: ast.ClassDef) -> set[ast.stmt]:
    """Module-level statements that define the names that `config` uses, transitively.

    All of a name, in their order.
    """
    defined: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for name in _defines(node):
            defined.setdefault(name, []).append(node)
    needed: set[ast.stmt] = set()
    todo: list[ast.stmt] = [config]
    while todo:
        for name in _uses(todo.pop()):
            for node in defined.get(name, ()):
                if node not in needed:
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        _check_light(node, name)
                    needed.add(node)
                    todo.append(node)
    return needed


def _check_light(node: ast.Import | ast.ImportFrom, name: str) -> None:
    if isinstance(node, ast.ImportFrom):
        sources = ["." * node.level + (node.module or "")]
    else:
        sources = [a.name for a in node.names]
    heavy = [
        s
        for s in sources
        if not {s, s.partition(".")[0]} & LIGHT_IMPORTS and not s.startswith(LIGHT_PACKAGE)
    ]
    if heavy:
        raise _Unreadable(
            f"Config uses {name}, which comes from {', '.join(heavy)}; a Config may use the "
            "standard library, sandbox.contracts and plugins._configs only",
            node.lineno,
        )


def _defines(node: ast.stmt) -> Iterator[str]:
    if (
        isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", "") != "__future__"
    ):
        yield from ((a.asname or a.name).split(".")[0] for a in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
    elif isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _uses(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def line_in(path: Path | None, error: BaseException) -> int:
    """The last line of the file `path` on the way to an error; 0 where it was not there."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def code_alone(source: bytes) -> bytes:
    """Python code without comments, docstrings and layout.

    Code that does not parse, such as cells of a notebook, is returned as it is.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()
