"""The reference of every group, option and setting, as Markdown made of the Configs themselves.

`python run.py task=plugins to=docs/reference` writes it. What stands there is what the program
reads: fields with their types and defaults, docstrings, the comments beside fields, and the values
that presets change. Imports nothing heavy.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from sandbox import contracts, registry
from sandbox.config import CONF, GROUPS, HOME, Root
from sandbox.registry import SEVERAL, Plugin
from sandbox.tasks.plugins import shown_value

OURS = (HOME / "plugins", HOME / "sandbox" / "tasks")
OTHERS = {
    "experiment": "recipes: what a published system, or a run of this project, consists of",
    "debug": "quick checks of any recipe",
    "sweep": "sweeps for agents of W&B: `wandb sweep conf/sweep/NAME.yaml`",
}
MOST = 80  # characters of a value; of a longer one, the file has the rest
TABLE = "| setting | type | default | |\n|---|---|---|---|"
MADE = "<!-- made by: python run.py task=plugins to=docs/reference -->"


def pages(folders: Sequence[Path] = ()) -> dict[str, str]:
    """File name -> text, for the plugins of the project and of `folders`.

    Raises PluginError for a plugin that cannot be read.
    """
    homes = (*OURS, *folders)
    known = [registry.find(p.key) for p in registry.plugins() if _in(p.path, homes)]
    groups = {g: [p for p in known if p.group.partition("/")[0] == g] for g in GROUPS}
    confs = [CONF, *(f / "conf" for f in folders)]
    made = {f"{g}.md": _group_page(g, found, confs) for g, found in groups.items() if found}
    made |= {f"{g}.md": _files_page(g, what, confs) for g, what in OTHERS.items()}
    return {"README.md": _index(groups)} | made


def _in(path: Path | None, folders: Sequence[Path]) -> bool:
    return path is not None and any(path.is_relative_to(f) for f in folders)


# --- pages ----------------------------------------------------------------------------------------


def _index(groups: dict[str, list[Plugin]]) -> str:
    rows = [
        f"| [{g}]({g}.md) | {what} | {', '.join(f'`{p.name}`' for p in groups[g])} |"
        for g, what in GROUPS.items()
    ]
    rows += [f"| [{g}]({g}.md) | {what} | |" for g, what in OTHERS.items()]
    own = [n for n in (f.name for f in fields(Root)) if n not in GROUPS]
    return _text(
        MADE,
        "# Reference",
        "Every group, option and setting, made of the `Config` classes that the program reads. "
        "`GROUP=OPTION` chooses, `GROUP.SETTING=VALUE` sets; an option of "
        f"{' and '.join(f'`{g}`' for g in SEVERAL)} is set by its name: `callbacks.samples.every`. "
        "`null` is an empty value; a number that is null by default is filled in by wiring.",
        "## Groups",
        "\n".join(["| group | | options without presets |", "|---|---|---|", *rows]),
        "## Settings of the run",
        _table(Root, own, HOME / "sandbox" / "config.py", "sandbox.config"),
    )


def _group_page(group: str, plugins: list[Plugin], confs: Sequence[Path]) -> str:
    several = f" `{group}=[A,B]`" if group in SEVERAL else ""
    base = _base(plugins)
    shared = [f.name for f in fields(base) if f.name != "plugin"] if base else []
    parts = [MADE, f"# {group}", f"{GROUPS[group][:1].upper()}{GROUPS[group][1:]}.{several}"]
    if base and shared:
        parts += ["## Every option", _prose(base), _table(base, shared, None, base.__module__)]
    presets = list(_presets(group, confs))
    for plugin in plugins:
        parts += _option(plugin, base, [p for p in presets if p[1] == plugin.name])
    return _text(*parts)


def _option(
    plugin: Plugin, base: type | None, presets: list[tuple[Path, str, dict[str, Any]]]
) -> Iterator[str]:
    config = plugin.config
    assert config and plugin.path  # pages() takes readable files alone
    yield f"## {plugin.name}"
    yield f"{plugin.doc} ({_link(plugin.path)})"
    yield _prose(config)
    yield _table(config, list(_own(config, base)), plugin.path, plugin.module)
    yield "\n".join(_preset(path, plain, config) for path, _, plain in presets)


def _files_page(group: str, what: str, confs: Sequence[Path]) -> str:
    parts = [MADE, f"# {group}", f"{what[:1].upper()}{what[1:]}."]
    for path in (p for conf in confs for p in sorted((conf / group).rglob("*.yaml"))):
        plain = _yaml(path)
        defaults = plain.pop("defaults", ())
        chosen = [f"{_last(k)}={shown_value(v)}" for d in defaults
                  if isinstance(d, dict) for k, v in d.items()]  # fmt: skip
        nested = [d for d in defaults if isinstance(d, str) and d != "_self_"]
        parts += [f"## {_place(path, group)}", f"{_about(path)} ({_link(path)})"]
        if nested:
            parts.append(f"Extends `{' '.join(nested)}`")
        if chosen:
            parts.append(f"Chooses `{' '.join(chosen)}`")
        own = {k: v for k, v in plain.items() if k not in GROUPS}  # the rest is in the file
        if own and group != "sweep":
            parts.append(f"Sets `{' '.join(_flat(own))}`")
    return _text(*parts)


def _place(path: Path, group: str) -> str:
    """The name by which a file of `group` is chosen: cogvideox_2b_lora, effects/zero_snr."""
    parts = path.with_suffix("").parts
    return "/".join(parts[len(parts) - parts[::-1].index(group) :])


# --- parts of pages -------------------------------------------------------------------------------


def _text(*parts: str) -> str:
    return "\n\n".join(p for p in parts if p) + "\n"


def _link(path: Path) -> str:
    if not path.is_relative_to(HOME):
        return f"`{path}`"
    place = path.relative_to(HOME).as_posix()
    return f"[{place}](../../{place})"


def _prose(config: type) -> str:
    """The docstring of a Config; empty where it has none of its own."""
    doc = inspect.cleandoc(config.__doc__ or "")
    return "" if doc.startswith(f"{config.__name__}(") else doc.replace("*", "\\*")


def _table(config: type, names: Sequence[str], path: Path | None, module: str) -> str:
    said = sayings(config, path, module)
    rows = []
    for f in (f for f in fields(config) if f.name in names):
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        kind, note = said[f.name]
        cells = (f"`{f.name}`", f"`{kind}`", f"`{shown_value(value)}`", note)
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join([TABLE, *rows]) if rows else ""


def _preset(path: Path, plain: dict[str, Any], config: type) -> str:
    """A line: its name, what it is, and the settings that are not those of the plugin alone."""
    usual = {*_flat(vars(config()))}
    changes = " ".join(c for c in _flat(plain) if c not in usual)
    return f"- `{path.stem}`: {_about(path)}" + (f" `{changes}`" if changes else "")


def _about(path: Path) -> str:
    """The first sentence of the comment on top of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = takewhile(lambda line: line.startswith("#"), lines)
    words = " ".join(line.lstrip("# ") for line in top if "@package" not in line)
    first = re.split(r"(?<=[^.]\.) +(?=[A-Z])", words)[0]
    return first if first.endswith(".") else f"{first}."


def _flat(plain: dict[str, Any], path: str = "") -> Iterator[str]:
    """a=1, b.c=[2,3]"""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            text = shown_value(value)
            yield f"{path}{key}={text if len(text) <= MOST else text[:MOST] + '...'}"


def _last(key: Any) -> str:
    return str(key).removeprefix("override ").lstrip("/")


# --- what Configs and presets say -----------------------------------------------------------------


def _base(plugins: list[Plugin]) -> type | None:
    """The Config of `sandbox.contracts` that the Configs of a group are derived from."""
    made = plugins[0].config
    assert made
    return next((c for c in made.__mro__ if c.__module__.startswith(contracts.__name__)), None)


def _own(config: type, base: type | None) -> Iterator[str]:
    """Fields that the base has not, or has with another default."""
    shared = {f.name: f.default for f in fields(base)} if base else {}
    for f in fields(config):
        if f.name != "plugin" and (f.name not in shared or f.default != shared[f.name]):
            yield f.name


def _presets(group: str, confs: Sequence[Path]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(file, name of its plugin, what it changes with all that it is derived from)."""
    for conf in confs:
        for path in sorted((conf / group).glob("*.yaml")):
            plain = _yaml(path)
            below = [d for d in plain.pop("defaults", ()) if isinstance(d, str) and d != "_self_"]
            while below and (parent := conf / group / f"{below[0]}.yaml").is_file():
                under = _yaml(parent)
                below = [d for d in under.pop("defaults", ()) if d != "_self_"]
                plain = {**under, **plain}
            name = below[0] if below else ""
            yield path, name, plain.get(name, {}) if group in SEVERAL else plain


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where PyYAML was built with it
    return yaml.load(path.read_text(encoding="utf-8"), quick)


def sayings(config: type, path: Path | None, module: str) -> dict[str, tuple[str, str]]:
    """Field -> its type as it is written, and the comment beside or above it."""
    found: dict[str, tuple[str, str]] = {}
    for cls in reversed(config.__mro__[:-1]):
        own = path is not None and cls.__module__ == module
        file = path if own else sys.modules[cls.__module__].__file__
        found |= _fields_of(Path(str(file)), cls.__qualname__)
    return found


@dataclass
class _Source:
    tree: ast.Module
    comments: dict[int, str]  # line -> text
    alone: frozenset[int]  # lines of nothing else


@cache
def _source(path: Path, stamp: int) -> _Source:
    with tokenize.open(path) as file:
        text = file.read()
    lines = text.splitlines()
    comments = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(iter(text.splitlines(True)).__next__)
        if t.type == tokenize.COMMENT and "fmt:" not in t.string and "type:" not in t.string
    }
    alone = frozenset(n for n in comments if lines[n - 1].lstrip().startswith("#"))
    return _Source(ast.parse(text), comments, alone)


def _fields_of(path: Path, qualname: str) -> dict[str, tuple[str, str]]:
    source = _source(path, os.stat(path).st_mtime_ns)
    node: Any = source.tree
    for name in qualname.split("."):
        node = next(n for n in node.body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        n.target.id: (ast.unparse(n.annotation), _note(source, n))
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }


def _note(source: _Source, node: ast.AnnAssign) -> str:
    end = node.end_lineno or node.lineno
    beside = [source.comments[n] for n in range(node.lineno, end + 1) if n in source.comments]
    line, above = node.lineno - 1, []
    while line in source.alone:
        above.insert(0, source.comments[line])
        line -= 1
    return " ".join([*above, *beside])
