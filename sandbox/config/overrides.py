"""The parts of a Hydra override, such as `+backbone.width=3`."""

import re
from typing import Any

LONG = 1000  # characters of a string that is quoted unseen: the grammar reads 10 kB a second


def key(override: str) -> str:
    """`backbone.width`, without a leading + or ~."""
    return override.partition("=")[0].lstrip("+~")


def value(override: str) -> str:
    return override.partition("=")[2]


def top(override: str) -> str:
    """The group or top-level setting: `backbone`."""
    return re.split(r"[=.@/]", override.lstrip("+~"))[0]


def parse(override: str) -> Any:
    """Hydra's Override. Raises HydraException for a syntax error."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def is_valid(override: str) -> bool:
    """Whether Hydra's grammar accepts an override."""
    from hydra.errors import HydraException

    try:
        parse(override)
    except HydraException:
        return False
    return True


def quote(text: str) -> str:
    """A string as a quoted value of Hydra's grammar, which unescapes only before a quote."""
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'


def with_quotes(override: str, is_text: bool = False) -> str:
    """An override whose list is quoted where Hydra's grammar needs it: `[a (red) cat]`.

    `is_text`: also elements that Hydra would read as numbers and write in another way, such as
    3.10. Returns the override itself where nothing is to quote or an element is ambiguous.
    """
    name, _, given = override.partition("=")
    if not given.startswith("["):
        return override
    if not is_text and len(given) < LONG and is_valid(override):
        return override
    lists = re.split(r"(?<=\]),(?=\[)", given)  # several in a sweep
    found = f"{name}={','.join(_list(text, is_text) for text in lists)}"
    return found if is_valid(found) else override


def _list(text: str, is_text: bool) -> str:
    """A list with quoted elements; the text itself where it is no list, or ambiguous."""
    elements = _elements(text[1:-1])
    if (text[:1], text[-1:]) != ("[", "]") or any(
        not e or e[0] in "[{" or _is_ambiguous(e) for e in elements
    ):
        return text
    return f"[{','.join(_quoted(e, is_text) for e in elements)}]"


def _is_ambiguous(element: str) -> bool:
    """Whether a comma in an element may separate two: `:( sad, b` or `'tis so, it's`."""
    is_open = any(element.count(a) != element.count(b) for a, b in ("()", "[]", "{}"))
    is_quoted = element[0] in "\"'" and not is_valid(f"x=[{element}]")
    return "," in element and (is_open or is_quoted)


def _quoted(element: str, is_text: bool) -> str:
    is_long = len(element) > LONG and element[0] not in "\"'"
    if is_long or not is_valid(f"x=[{element}]"):
        is_open = element.count("{") > element.count("}")  # `${` starts no interpolation
        return quote(element.replace("${", r"\${") if is_open else element)
    (found,) = parse(f"x=[{element}]").value()
    is_other = isinstance(found, int | float) and str(found) != element
    return quote(element) if is_text and is_other else element


def _elements(text: str) -> list[str]:
    """The elements of a list; a comma inside quotes or brackets separates nothing."""
    found, depth, mark = [""], 0, ""
    for i, c in enumerate(text):
        if mark:
            mark = "" if c == mark and text[i - 1] != "\\" else mark
        elif c in "\"'" and not found[-1].strip():
            mark = c  # elsewhere it is an apostrophe
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth = max(0, depth - 1)
        elif c == "," and not depth:
            found.append("")
            continue
        found[-1] += c
    return [e.strip() for e in found]
