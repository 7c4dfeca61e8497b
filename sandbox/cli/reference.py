"""Generates the reference of every group, option and setting, as Markdown.

`python run.py task=plugins to=docs/reference` writes it from the Configs: fields with types,
defaults and comments, docstrings, and the settings of presets. Imports no plugin.
"""

from __future__ import annotations

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

OURS = (CHECKOUT / "plugins", CHECKOUT / "sandbox" / "tasks")
OTHERS = {**YAML_GROUPS, "sweep": "sweeps for W&B agents: `wandb sweep conf/sweep/NAME.yaml`"}
MAX_LENGTH = 80  # characters of a value
TABLE = "| setting | type | default | |\n|---|---|---|---|"
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
    return {"README.md": _index(groups)} | made


# --- pages ----------------------------------------------------------------------------------------


def _index(groups: dict[str, list[Plugin]]) -> str:
    rows = [
        f"| [{g}]({g}.md) | {title} | {', '.join(f'`{p.name}`' for p in groups.get(g, ()))} |"
        for g, title in (GROUPS | OTHERS).items()
    ]
    own = [f.name for f in fields(Root) if f.name not in GROUPS]
    return _text(
        MADE,
        "# Reference",
        "Every group, option and setting, generated from the `Config` classes. `GROUP=OPTION` "
        "chooses an option, `GROUP.SETTING=VALUE` sets a value; settings of "
        f"{' and '.join(f'`{g}`' for g in SEVERAL)} include the name of the option: "
        "`callbacks.samples.every`. `null` is an empty value; wiring fills in numbers with the "
        "default null.",
        "## Groups",
        "\n".join(["| group | | options without presets |", "|---|---|---|", *rows]),
        "## Settings of the run",
        _table(Root, own, CHECKOUT / "sandbox" / "config" / "root.py", "sandbox.config.root"),
    )


def _group_page(group: str, plugins: list[Plugin], confs: Sequence[Path]) -> str:
    several = f" `{group}=[A,B]`" if group in SEVERAL else ""
    base = _base(plugins)
    shared = [f.name for f in fields(base) if f.name != "plugin"] if base else []
    parts = [MADE, f"# {group}", f"{_sentence(GROUPS[group])}{several}"]
    if base and shared:
        parts += ["## Every option", _markdown(base), _table(base, shared, None, base.__module__)]
    presets = list(_presets(group, confs))
    for plugin in plugins:
        parts += _option(plugin, base, [p for p in presets if p[1] == plugin.name])
    return _text(*parts)


def _option(
    plugin: Plugin, base: type | None, presets: list[tuple[Path, str, dict[str, Any]]]
) -> Iterator[str]:
    config = plugin.config
    assert config and plugin.path  # pages() passes only readable files
    yield f"## {plugin.name}"
    yield f"{plugin.doc} ({_link(plugin.path)})"
    yield _markdown(config)
    yield _table(config, list(_own(config, base)), plugin.path, plugin.module)
    yield "\n".join(_preset(path, plain, config) for path, _, plain in presets)


def _files_page(group: str, title: str, confs: Sequence[Path]) -> str:
    parts = [MADE, f"# {group}", _sentence(title)]
    for path in (p for conf in confs for p in sorted((conf / group).rglob("*.yaml"))):
        plain = _yaml(path)
        defaults = plain.pop("defaults", ())
        chosen = [
            f"{str(k).removeprefix('override ').lstrip('/')}={format_value(v)}"
            for d in defaults
            if isinstance(d, dict)
            for k, v in d.items()
        ]
        nested = [d for d in defaults if isinstance(d, str) and d != "_self_"]
        parts += [f"## {_option_name(path, group)}", f"{about(path)} ({_link(path)})"]
        if nested:
            parts.append(f"Extends `{' '.join(nested)}`")
        if chosen:
            parts.append(f"Chooses `{' '.join(chosen)}`")
        own = {k: v for k, v in plain.items() if k not in GROUPS}  # the file shows the rest
        if own and group != "sweep":
            parts.append(f"Sets `{' '.join(_flat(own))}`")
    return _text(*parts)


def _option_name(path: Path, group: str) -> str:
    """The option name of a file of `group`: cogvideox_2b_lora, effects/zero_snr."""
    parts = path.with_suffix("").parts
    return "/".join(parts[len(parts) - parts[::-1].index(group) :])


# --- parts of pages -------------------------------------------------------------------------------


def _text(*parts: str) -> str:
    return "\n\n".join(p for p in parts if p) + "\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _link(path: Path) -> str:
    if not path.is_relative_to(CHECKOUT):
        return f"`{path}`"
    name = path.relative_to(CHECKOUT).as_posix()
    return f"[{name}](../../{name})"


def _markdown(config: type) -> str:
    return docstring(config).replace("*", "\\*")


def _table(config: type, names: Sequence[str], path: Path | None, module: str) -> str:
    notes, rows = field_notes(config, path, module), []
    for f in (f for f in fields(config) if f.name in names):
        value = f.default_factory() if f.default_factory is not MISSING else f.default
        annotation, note = notes[f.name]
        cells = (f"`{f.name}`", f"`{annotation}`", f"`{format_value(value)}`", note)
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join([TABLE, *rows]) if rows else ""


def _preset(path: Path, plain: dict[str, Any], config: type) -> str:
    """A list item: the preset's name, its description, and the settings that it changes."""
    defaults = {*_flat(vars(config()))}
    changes = " ".join(c for c in _flat(plain) if c not in defaults)
    return f"- `{path.stem}`: {about(path)}" + (f" `{changes}`" if changes else "")


def about(path: Path) -> str:
    """The first sentence of the comment at the top of a YAML file."""
    if not path.is_file():
        return "(no regular file)"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.lstrip("# ") for line in comment if "@package" not in line)
    return re.split(r"(?<=[^.]\.) +(?=[A-Z])", text)[0].removesuffix(".") + "."


def _flat(plain: dict[str, Any], path: str = "") -> Iterator[str]:
    """a=1, b.c=[2,3]"""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            text = format_value(value)
            yield f"{path}{key}={text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + '...'}"


# --- reading Configs and presets ------------------------------------------------------------------


def docstring(config: type) -> str:
    """The docstring of a Config; empty where @dataclass generated it."""
    doc = inspect.getdoc(config) or ""
    return "" if doc.startswith(f"{config.__name__}(") else doc


def _base(plugins: list[Plugin]) -> type | None:
    """The class of `sandbox.contracts` from which the Configs of a group derive."""
    classes = plugins[0].config.__mro__ if plugins[0].config else ()
    return next((c for c in classes if c.__module__.startswith(contracts.__name__)), None)


def _own(config: type, base: type | None) -> Iterator[str]:
    """Fields that the base lacks, or has with another default."""
    shared = {f.name: f.default for f in fields(base)} if base else {}
    for f in fields(config):
        if f.name != "plugin" and (f.name not in shared or f.default != shared[f.name]):
            yield f.name


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
