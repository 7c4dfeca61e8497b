"""Generates the reference of every group, option and setting, as Markdown.

`python run.py task=plugins to=docs/reference` writes it from the Configs: fields with types,
defaults and comments, docstrings, and the settings of presets. Imports no plugin.
"""

import ast
import inspect
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from sandbox import contracts
from sandbox.config import registry
from sandbox.config.paths import CHECKOUT, CONF
from sandbox.config.registry import SEVERAL, Plugin
from sandbox.config.root import GROUPS, YAML_GROUPS, Root
from sandbox.reports.pages import flatten, render

OURS = (CHECKOUT / "plugins", CHECKOUT / "sandbox" / "tasks")
OTHERS = {**YAML_GROUPS, "sweep": "sweeps for W&B agents: `wandb sweep conf/sweep/NAME.yaml`"}
MAX_LENGTH = 80  # characters of a value
MADE = "<!-- made by: python run.py task=plugins to=docs/reference -->"


def pages(folders: Sequence[Path] = ()) -> dict[str, str]:
    """File name -> text, for the plugins of the project and of `folders`.

    Raises PluginError for a plugin that cannot be read.
    """
    known = [
        registry.find(p.key)
        for p in registry.plugins()
        if p.path and any(map(p.path.is_relative_to, (*OURS, *folders)))
    ]
    groups = {g: [p for p in known if p.group.partition("/")[0] == g] for g in GROUPS}
    confs = [CONF, *(f / "conf" for f in folders)]
    made = {f"{g}.md": _group_page(g, found, confs) for g, found in groups.items() if found}
    made |= {f"{g}.md": _files_page(g, title, confs) for g, title in OTHERS.items()}
    own = [f.name for f in fields(Root) if f.name not in GROUPS]
    root = CHECKOUT / "sandbox" / "config" / "root.py"
    index = _page("index", groups=groups, titles=GROUPS | OTHERS, several=SEVERAL,
                  settings=_rows(Root, own, root, Root.__module__))  # fmt: skip
    return {"README.md": index} | made


# --- pages ----------------------------------------------------------------------------------------


def _group_page(group: str, plugins: list[Plugin], confs: Sequence[Path]) -> str:
    base = _base(plugins)
    shared = [f.name for f in fields(base) if f.name != "plugin"] if base else []
    return _page(
        "group", group=group, title=GROUPS[group], is_several=group in SEVERAL, base=base,
        shared=_rows(base, shared, None, "") if base else [], plugins=plugins,
        presets=list(_presets(group, confs)), own=_own, changes=_changes, docstring=docstring,
        rows=_rows,
    )  # fmt: skip


def _files_page(group: str, title: str, confs: Sequence[Path]) -> str:
    files = []
    for path in (p for conf in confs for p in sorted((conf / group).rglob("*.yaml"))):
        plain = _yaml(path)
        defaults = plain.pop("defaults", ())
        own = {k: v for k, v in plain.items() if k not in GROUPS}  # the file shows the rest
        changed = _changes(own) if group != "sweep" else ""
        files.append((_option_name(path, group), path, defaults, changed))
    return _page("files", group=group, title=title, files=files, format_value=format_value)


def _page(kind: str, **context: Any) -> str:
    text = render(f"reference_{kind}.md", made=MADE, link=_link, description=description, **context)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # empty parts leave no gap


def _option_name(path: Path, group: str) -> str:
    """The option name of a file of `group`: cogvideox_2b_lora, effects/zero_snr."""
    parts = path.with_suffix("").parts
    return "/".join(parts[len(parts) - parts[::-1].index(group) :])


# --- parts of pages -------------------------------------------------------------------------------


def _link(path: Path) -> str:
    if not path.is_relative_to(CHECKOUT):
        return f"`{path}`"
    name = path.relative_to(CHECKOUT).as_posix()
    return f"[{name}](../../{name})"


def _rows(config: type, names: Sequence[str], path: Path | None, module: str) -> list[Any]:
    """(name, type, default, comment) of the fields `names` of a Config."""
    notes = field_notes(config, path, module)
    rows = []
    for f in (f for f in fields(config) if f.name in names):
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        rows.append((f.name, notes[f.name][0], format_value(value), notes[f.name][1]))
    return rows


def _changes(plain: dict[str, Any], config: type | None = None) -> str:
    """The settings of a YAML file: a=1 b.c=[2,3]; without the defaults of `config`."""
    defaults = {*_flat(vars(config()))} if config else ()
    return " ".join(c for c in _flat(plain) if c not in defaults)


def description(path: Path) -> str:
    """The first sentence of the comment at the top of a YAML file."""
    if not path.is_file():
        return "(no regular file)"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ") for line in comment if "@package" not in line)
    return re.split(r"(?<=[^.]\.) +(?=[A-Z])", text)[0].removesuffix(".") + "."


def _flat(plain: dict[str, Any]) -> Iterator[str]:
    for name, value in flatten(plain).items():
        text = format_value(value)
        yield f"{name}={text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + '...'}"


# --- reading Configs and presets ------------------------------------------------------------------


def docstring(config: type) -> str:
    """The docstring of a Config; empty where @dataclass generated it."""
    doc = inspect.getdoc(config) or ""
    return "" if doc.startswith(f"{config.__name__}(") else doc


def _base(plugins: list[Plugin]) -> type | None:
    """The class of `sandbox.contracts` from which the Configs of a group derive."""
    classes = plugins[0].config.__mro__ if plugins[0].config else ()
    return next((c for c in classes if c.__module__.startswith(contracts.__name__)), None)


def _own(config: type, base: type | None) -> list[str]:
    """Fields that the base lacks, or has with another default."""
    shared = {(f.name, f.default) for f in fields(base)} if base else set()
    own = [f.name for f in fields(config) if (f.name, f.default) not in shared]
    return [name for name in own if name != "plugin"]


def _presets(group: str, confs: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(file, plugin, settings including those of parent presets) of each preset."""
    for conf in confs:
        for path in sorted((conf / group).glob("*.yaml")):
            plain = _yaml(path)
            parents = [d for d in plain.pop("defaults", ()) if isinstance(d, str) and d != "_self_"]
            while parents and (file := conf / group / f"{parents[0]}.yaml").is_file():
                parent = _yaml(file)
                parents = [d for d in parent.pop("defaults", ()) if d != "_self_"]
                plain = {**parent, **plain}
            name = parents[0] if parents else ""
            yield path, name, plain.get(name, {}) if group in SEVERAL else plain


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the faster one, if PyYAML has it
    return yaml.load(path.read_text(encoding="utf-8"), loader)


def field_notes(config: type, path: Path | None, module: str) -> dict[str, tuple[str, str]]:
    """Field -> its annotation as in the source, and its comment (at the line's end or above)."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(config.__mro__[:-1]):
        own = path is not None and cls.__module__ == module
        file = Path(str(path if own else sys.modules[cls.__module__].__file__))
        tree, comments, full_line = _source(file, file.stat().st_mtime_ns)
        node: Any = tree
        for name in cls.__qualname__.split("."):
            node = next(n for n in node.body if isinstance(n, ast.ClassDef) and n.name == name)
        for n in node.body:
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
                first, last = n.lineno, n.end_lineno or n.lineno
                while first - 1 in full_line:
                    first -= 1
                note = " ".join(comments[i] for i in range(first, last + 1) if i in comments)
                found[n.target.id] = (ast.unparse(n.annotation), note)
    return found


@cache
def _source(path: Path, mtime: int) -> tuple[ast.Module, dict[int, str], frozenset[int]]:
    """Syntax tree of a file, its comments by line, and the lines with nothing but a comment."""
    with tokenize.open(path) as file:
        lines = file.read().splitlines(True)
    comments = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(iter(lines).__next__)
        if t.type == tokenize.COMMENT and "fmt:" not in t.string and "type:" not in t.string
    }
    full_line = frozenset(n for n in comments if lines[n - 1].lstrip().startswith("#"))
    return ast.parse("".join(lines)), comments, full_line


def settings(config: Any) -> Iterator[str]:
    """The settings of a Config as users type them: name=value."""
    for f in fields(config):
        if f.name != "plugin":
            yield f"{f.name}={format_value(getattr(config, f.name))}"


def format_value(value: Any) -> str:
    """A value as users type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{','.join(map(format_value, value))}]"
    return str(value)
