"""HTML and SVG that cannot be broken by what a user writes: text is escaped unless it is Markup."""

from __future__ import annotations

from html import escape

VOID = frozenset({"br", "hr", "img", "input", "meta"})


class Markup(str):
    """A piece of HTML, complete and safe."""


def text(content: object) -> Markup:
    """Any text as markup; Markup stays what it is."""
    return content if isinstance(content, Markup) else Markup(escape(str(content)))


def join(*pieces: object) -> Markup:
    return Markup("".join(text(p) for p in pieces))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` is class, other `_` are `-`; None and False leave one out."""
    written = ""
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            written += f" {key}"
        elif value is not None and value is not False:
            written += f' {key}="{escape(str(value))}"'
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")
