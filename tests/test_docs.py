"""The guides: what they quote is in the source, what they link to is there, commands compose."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sandbox.cli.command_line import parse
from sandbox.config import composition, discovery
from sandbox.config.paths import CHECKOUT
from sandbox.config.root import GROUPS, to_root

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
HOLE = "\N{HORIZONTAL ELLIPSIS}"  # a value in a message; the page writes three dots
MESSAGE = re.compile(r"^\| `(.+?)` \|", re.M)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[\w&-]+)?\)")
COMMAND = re.compile(r"^ +(python run\.py .*)$", re.M)
ERRORS = ("ConfigError", "PluginError", "DataError", "Diverged", "StorageError", "Preempted",
          "RankError", "SandboxError", "_Unreadable")  # fmt: skip
YOURS = ("=mine", "=theirs", "[mine]")  # options that only a reader has
MOST_WORDS = 1300  # read in five minutes; error messages are looked up instead
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


# --- messages -------------------------------------------------------------------------------------


@cache
def messages() -> tuple[str, ...]:
    """Every text of the program with its values left out; docstrings are none."""
    files = (p for d in ("sandbox", "plugins", "kernels") for p in (CHECKOUT / d).rglob("*.py"))
    return tuple(text for path in files for text in _texts(path))


def _texts(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    yield from (t for n in ast.walk(tree) if id(n) not in docs and (t := _text(n)))


def _text(node: ast.AST) -> str:
    """Of a string in the source; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
        return "".join(map(str, parts))
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return re.sub(r"%(?:\.\d)?[sdgr]", HOLE, node.value) if is_text else ""


def quoted() -> list[str]:
    page = (CHECKOUT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return MESSAGE.findall(page)


@cache
def pattern(message: str) -> re.Pattern[str]:
    """Finds the fixed parts of a message, in this order."""
    return re.compile(".*".join(map(re.escape, filter(str.strip, message.split("...")))), re.DOTALL)


def is_said(message: str) -> bool:
    return any(pattern(message).search(text) for text in messages())


def raised() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every error that ends a command and whose words stand where it is."""
    for path in (p for d in ("sandbox", "plugins") for p in sorted((CHECKOUT / d).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            error = getattr(node, "exc", None)
            if isinstance(error, ast.Call) and ast.unparse(error.func) in ERRORS:
                place = f"{path.relative_to(CHECKOUT)}:{node.lineno}"
                yield from ((place, text) for arg in error.args if (text := _text(arg)))


@pytest.mark.parametrize("message", quoted())
def test_a_message_on_the_page_is_one_of_the_program(message):
    assert is_said(message)


def test_every_error_that_ends_a_command_is_of_a_family_on_the_page():
    known = [pattern(m) for m in quoted()]
    said = [x for x in raised() if len(re.findall("[a-z]+", x[1])) > 2]  # others pass words on
    lost = [f"{place}: {text}" for place, text in said if not any(k.search(text) for k in known)]
    assert lost == [], "docs/troubleshooting.md has no row for them"


def test_no_message_stands_twice():
    assert len(set(quoted())) == len(quoted()) > 80


def test_a_message_that_nobody_says_is_found():
    assert not is_said("...: no such thing as a free ...")
    assert not is_said("keep one...is given twice")


# --- pages ----------------------------------------------------------------------------------------


@each_page
def test_what_a_page_links_to_is_there(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [x for x in links if not (page.parent / x).exists()] == []


@each_page
def test_a_page_is_read_in_five_minutes(page):
    words = len(page.read_text(encoding="utf-8").split())
    assert words < MOST_WORDS or page.name in (
        "README.md", "migration.md", "troubleshooting.md"
    )  # fmt: skip


def test_the_index_has_every_page():
    index = (CHECKOUT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if p.name != "README.md" and f"({p.name})" not in index] == []


def test_the_page_of_examples_has_every_group():
    page = (CHECKOUT / "docs" / "adding.md").read_text(encoding="utf-8")
    missing = [g for g in GROUPS if f"../sandbox/templates/{g}/plugin.py.txt" not in page]
    assert missing == []


# --- commands -------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Lines that begin with `python run.py`, without their comments; a `\\` continues one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return list(dict.fromkeys(COMMAND.findall(text)))


def first_values(word: str) -> str:
    """A word of a multirun as its first job has it."""
    name, _, value = word.partition("=")
    plain = value[:1] not in "[{'\"(" and "(" not in value
    return f"{name}={value.split(',')[0]}" if plain else word


@pytest.mark.slow
@each_page
def test_the_commands_of_a_page_compose(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)[2:]
        if "..." in words or any(w.endswith(YOURS) for w in words):
            continue
        parsed = parse(words)
        overrides = [first_values(w) for w in parsed.overrides if not w.startswith("seeds=")]
        if any("hydra/sweeper" in w for w in overrides):  # whose words only a sweep reads
            overrides = [w for w in overrides if "(" not in w and not w.startswith("hydra")]
        discovery.setup(overrides)
        made = composition.compose(composition.expand_shorthands(overrides))
        assert to_root(made).task is not None, line
