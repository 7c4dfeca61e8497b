"""Reads a plugin's Config without importing its file.

The reader parses the file (ast) and executes only the nested `Config` class and the module-level
statements that define the names it uses, transitively. A Config may import from the standard
library, `sandbox.contracts` and `plugins._configs` (which obeys the same rule), so reading is fast.
"""

from __future__ import annotations

import ast
import marshal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

from sandbox.config.conformance import check_config
from sandbox.config.guarded import Refused, guarded
from sandbox.contracts import PluginConfig

LIGHT_IMPORTS = frozenset(sys.stdlib_module_names) | {"sandbox.contracts"}
LARGEST = 2**20  # bytes of a plugin file
LIGHT_PACKAGE = "plugins._configs."  # code that several Configs share


@dataclass
class Reading:
    """The content of a plugin file: its Config, or the reason why it cannot be read."""

    doc: str = ""  # first line of the docstring
    config: type[PluginConfig] | None = None
    helpers: tuple[type, ...] = ()  # further classes that the Config uses
    error: str | None = None
    compiled: Compiled | None = None  # only of a file without an error

    @property
    def words(self) -> tuple[str, ...]:
        """The strings among the attributes of the Config."""
        values = vars(self.config).values() if self.config else ()
        return tuple(v for v in values if isinstance(v, str))


@dataclass(frozen=True)
class Compiled:
    """A Config that was read without an error, as code that defines it again."""

    doc: str
    words: tuple[str, ...]  # as `Reading.words`
    owner: str  # name of the plugin's class
    line: int  # of the Config
    helpers: tuple[str, ...]  # names of the further classes
    code: bytes  # marshalled


class LaterReading:
    """A `Reading` of a file whose content was read before: its code runs when it is needed."""

    def __init__(self, compiled: Compiled, read: Callable[[], Reading]) -> None:
        self.doc, self.words, self.compiled, self.read = (
            compiled.doc,
            compiled.words,
            compiled,
            read,
        )

    @cached_property
    def _reading(self) -> Reading:
        return self.read()

    @property
    def config(self) -> type[PluginConfig] | None:
        return self._reading.config

    @property
    def helpers(self) -> tuple[type, ...]:
        return self._reading.helpers

    @property
    def error(self) -> str | None:
        """None as long as the code has not run: it ran without an error before."""
        return self._reading.error if "_reading" in vars(self) else None


def read(path: Path, module: str, group: str, name: str, text: str | None = None) -> Reading:
    """Reads the plugin `group/name` from a file with the import name `module`. Never raises.

    `text`: the content of the file, if it is known.
    """
    found = Reading()
    try:
        tree = ast.parse(source(path) if text is None else text, str(path))
        cls = _registered_class(tree, group, name)
        found.doc = first_line(ast.get_docstring(cls)) or first_line(ast.get_docstring(tree))
        compiled = _compiled(tree, cls, path, found.doc)
        config, helpers = _run(compiled, module, path)
        _check_defaults(config, compiled.line)
        check_config(config, group, name, str(path))
        found.config, found.helpers = config, helpers
        found.compiled = replace(compiled, words=found.words)
    except SyntaxError as e:
        found.error = f"{path}:{e.lineno}: {e.msg}"
    except (OSError, ValueError) as e:  # no access, not UTF-8, a null byte
        found.error = f"{path}:1: cannot be read ({e})"
    except (RecursionError, MemoryError):
        found.error = f"{path}:1: cannot be read (nested too deeply)"
    except _Unreadable as e:
        found.error = f"{path}:{e.args[1]}: {e.args[0]}"
    return found


def read_again(
    compiled: Compiled, path: Path, module: str, group: str, name: str, text: str
) -> LaterReading:
    """The reading of a file with the content `text`, from what `read` compiled of it before."""

    def run() -> Reading:
        try:
            config, helpers = _run(compiled, module, path)
        except _Unreadable:  # it depends on more than its content
            return read(path, module, group, name, text)
        check_config(config, group, name, str(path))
        return Reading(compiled.doc, config, helpers, None, compiled)

    return LaterReading(compiled, run)


def source(path: Path) -> str:
    """The text of a regular file of at most LARGEST bytes. Raises OSError, ValueError."""
    if not path.is_file():
        raise ValueError("no regular file")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{size} bytes, want at most {LARGEST}")
    return path.read_text(encoding="utf-8")


class _Unreadable(Exception):
    """(reason, line)"""


def _registered_class(tree: ast.Module, group: str, name: str) -> ast.ClassDef:
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("register"):
                given = tuple(a.value for a in decorator.args if isinstance(a, ast.Constant))
                if given != (group, name):
                    raise _Unreadable(
                        f"registers {given}, but its path requires @register({group!r}, {name!r})",
                        node.lineno,
                    )
                return node  # type: ignore[return-value]
    raise _Unreadable(f"no class has the decorator @register({group!r}, {name!r})", 1)


def _compiled(tree: ast.Module, cls: ast.ClassDef, path: Path, doc: str) -> Compiled:
    """The code of the Config class and of the module-level statements that it needs."""
    config = next((n for n in cls.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
    if config is None:
        raise _Unreadable(f"{cls.name} needs a nested dataclass named Config", cls.lineno)
    needed = _closure(tree, config)
    body = [n for n in tree.body if n in needed] + [config]
    helpers = tuple(n.name for n in body if isinstance(n, ast.ClassDef) and n is not config)
    code: CodeType = compile(ast.Module(body, []), str(path), "exec", dont_inherit=True)
    return Compiled(doc, (), cls.name, config.lineno, helpers, marshal.dumps(code))


def _run(
    compiled: Compiled, module: str, path: Path
) -> tuple[type[PluginConfig], tuple[type, ...]]:
    """Executes the code of a Config; returns it and the further classes. Raises _Unreadable."""
    space: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    try:
        with guarded():
            exec(marshal.loads(compiled.code), space)
            if isinstance(space.get("Config"), type):
                with suppress(TypeError):  # a field without a default; said below
                    space["Config"]()
    except (Exception, Refused) as e:  # the plugin's own code may raise anything
        line = line_in(path, e) or compiled.line
        text = str(e) if isinstance(e, Refused) else f"{type(e).__name__}: {first_line(str(e))}"
        raise _Unreadable(f"Config cannot be read: {text}", line) from e
    cfg = space["Config"]
    if not (isinstance(cfg, type) and is_dataclass(cfg) and issubclass(cfg, PluginConfig)):
        raise _Unreadable(
            "Config must be a dataclass derived from a Config of sandbox.contracts", compiled.line
        )
    cfg.__qualname__ = f"{compiled.owner}.Config"
    return cfg, tuple(space[n] for n in compiled.helpers)


def _check_defaults(config: type[PluginConfig], line: int) -> None:
    """Raises _Unreadable for a field without a default or of a type that OmegaConf lacks."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.structured(config())
    except (TypeError, NameError, ValueError, OmegaConfBaseException) as e:
        raise _Unreadable(f"Config cannot be used: {first_line(str(e))}", line) from e


def _closure(tree: ast.Module, config: ast.ClassDef) -> set[ast.stmt]:
    """All module-level statements that define names that `config` uses, transitively."""
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
    is_from = isinstance(node, ast.ImportFrom)
    sources = ["." * node.level + (node.module or "")] if is_from else [a.name for a in node.names]
    light = [s for s in sources if {s, s.partition(".")[0]} & LIGHT_IMPORTS]
    heavy = [s for s in sources if s not in light and not s.startswith(LIGHT_PACKAGE)]
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
    """The innermost line of the file `path` in an error's traceback; 0 if it is not in it."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def code_alone(source: bytes) -> bytes:
    """Python code without comments, docstrings and formatting.

    Returns code that does not parse, such as notebook cells, unchanged.
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
