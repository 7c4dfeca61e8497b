"""Text in overrides: what Hydra's grammar refuses works, or the hint is what must be typed."""

from __future__ import annotations

import re
import shlex

import pytest

from sandbox.cli.command_line import parse
from sandbox.cli.multirun import jobs
from sandbox.config import composition, discovery
from sandbox.config.overrides import parse as parse_override
from sandbox.config.overrides import quote, with_quotes
from sandbox.config.root import to_root
from sandbox.contracts import ConfigError

CAT = "\U0001f408"


def prompts(*words: str) -> tuple[str, ...]:
    line = parse(["task=sample", "init_from=x", *words])
    discovery.setup(line.overrides)
    return to_root(line.compose(composition.expand_shorthands(line.overrides))).task.prompts


WORKS = [  # the list as typed, and the prompts
    (f"[{CAT} in a hat]", [f"{CAT} in a hat"]),
    ("[a (red) cat]", ["a (red) cat"]),
    ("[a (red, blue) cat, b]", ["a (red, blue) cat", "b"]),
    ("[a [red] cat]", ["a [red] cat"]),
    ("[a {red} cat]", ["a {red} cat"]),
    ("[a: b]", ["a: b"]),
    ("[it's a cat, two dogs' bones]", ["it's a cat", "two dogs' bones"]),
    ("['tis a cat]", ["'tis a cat"]),
    ('[a "red" cat]', ['a "red" cat']),
    ('["a, b", c]', ["a, b", "c"]),
    ("[cost $5]", ["cost $5"]),
    ("[${a]", ["${a"]),
    ("[a=b, c==d]", ["a=b", "c==d"]),
    ("[caf\u00e9, \u732b]", ["caf\u00e9", "\u732b"]),
    ("[a\u2014b, \u201ca\u201d]", ["a\u2014b", "\u201ca\u201d"]),
    ("[a #1 cat; b & c | d?!]", ["a #1 cat; b & c | d?!"]),
    ("[a :) smile, b]", ["a :) smile", "b"]),
    ("[back\\slash (x)\\]", ["back\\slash (x)\\"]),
    ("[two\nlines]", ["two\nlines"]),
    ("[3.10, 1e3, 007, true]", ["3.10", "1e3", "007", "true"]),
    ("[]", []),
]  # fmt: skip
REFUSED = [  # words as a shell splits them, and the prompts of the hint
    (["prompts=a (red) cat"], ["a (red) cat"]),
    (["prompts=it's a cat"], ["it's a cat"]),
    ([f"prompts={CAT}"], [CAT]),
    (["prompts=a red 3"], ["a red 3"]),
    (["prompts=a, b"], ["a, b"]),
    (["prompts=[a", "(red)", "cat]"], ["a (red) cat"]),
    (["prompts=[a", "red", "3,", "b]"], ["a red 3", "b"]),
    (["prompts=[a :( sad, b]"], ["a :( sad", "b"]),
    (["prompts=['tis so, it's]"], ["'tis so", "it's"]),
    (["prompts=[null]"], ["null"]),
    (["prompts={a}"], ["{a}"]),
]


@pytest.mark.parametrize(("typed", "found"), WORKS)
def test_a_list_of_texts_needs_no_quotes_inside(typed, found):
    assert prompts(f"prompts={typed}") == tuple(found)


@pytest.mark.parametrize(("words", "found"), REFUSED)
def test_the_hint_is_what_must_be_typed(words, found):
    with pytest.raises(ConfigError) as e:
        prompts(*words)
    hint = re.search(r"'task\.prompts=.*", str(e.value), re.S)
    assert hint, str(e.value)
    (word,) = shlex.split(hint[0])
    assert prompts(word) == tuple(found)


def test_an_interpolation_that_finds_nothing_says_how_to_write_the_text():
    with pytest.raises(ConfigError, match=r"write \\\$\{\.\.\.\} for the text itself"):
        prompts("prompts=[${a}]")
    assert prompts('prompts=["\\${a}"]') == ("${a}",)


def test_lists_of_a_sweep_are_quoted_one_by_one():
    words = ["-m", "task=sample", "prompts=[a (red) cat],[b;c]"]
    found = jobs(composition.expand_shorthands(parse(words).overrides))
    assert [parse_override(j[1]).value() for j in found or ()] == [["a (red) cat"], ["b;c"]]


TEXTS = ["", "a", "\\", '"', '\\"', "a\\\\", "'", "a\nb", "${x}", '\\\\"b']


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_is_read_as_itself(text):
    assert str(parse_override(f"x={quote(text)}").value()) == text
    assert with_quotes(f"x=[{quote(text)}]") == f"x=[{quote(text)}]"


SWEEPS = [  # a sweep as Hydra documents it, and the first values of its jobs
    ("backbone=glob(dit_*)", ["dit_b2", "dit_l2", "dit_s2", "dit_xl2"]),
    ("backbone=glob(dit_w*)", ["dit_w8", "dit_w9"]),
    ("backbone=glob(dit*,exclude=dit_*)", ["dit"]),
    ("backbone=glob([dit_b*,dit_s*])", ["dit_b2", "dit_s2"]),
    ("backbone=glob([dit*],exclude=[*2,dit_w*])", ["dit"]),
    ("backbone=dit,unet2d", ["dit", "unet2d"]),
    ("backbone=choice(dit,unet2d)", ["dit", "unet2d"]),
    ("backbone=sort(unet2d,dit)", ["dit", "unet2d"]),
    ("backbone=sort(dit,unet2d,reverse=true)", ["unet2d", "dit"]),
    ("experiment=glob(digits_*)", ["digits_long", "digits_speeds"]),
    ("seed=range(3)", ["0", "1", "2"]),
    ("seed=range(4,8,step=2)", ["4", "6"]),
    ("lr=tag(peak,choice(1e-4,1e-5))", ["0.0001", "1e-05"]),
]


@pytest.mark.parametrize(("typed", "values"), SWEEPS)
def test_sweeps_are_those_that_hydra_documents(plugin_folder, typed, values):
    if "dit_w" in typed:
        presets = plugin_folder / "conf" / "backbone"
        presets.mkdir(parents=True)
        for width in (8, 9):
            (presets / f"dit_w{width}.yaml").write_text(f"defaults: [dit]\nwidth: {width}\n")
    discovery.setup()
    found = jobs(composition.expand_shorthands(["lr=1", typed] if "lr" not in typed else [typed]))
    assert [job[-1].partition("=")[2] for job in found or ()] == values


def test_shuffle_has_the_same_jobs_in_another_order():
    found = jobs(composition.expand_shorthands(["seed=shuffle(range(9))"]))
    assert sorted(job[0] for job in found or ()) == [f"seed={i}" for i in range(9)]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("backbone=glob(nothing*)", "no such option of backbone; there is "),
        ("lr=glob(1*)", "lr=glob(1*): glob(...) matches options of a group"),
        ("backbne=glob(dit*)", "backbne=glob(dit*): glob(...) matches options of a group"),
        ("lr=interval(0,1)", "lists (1,2), choice(...), range(...) and glob(...) only"),
        ("backbone=shuffle(glob(dit*))", "cannot be parsed"),
    ],
)
def test_a_sweep_without_jobs_says_what_would_have_some(typed, words):
    discovery.setup()
    with pytest.raises(ConfigError, match=re.escape(words)):
        jobs(composition.expand_shorthands([typed]))
